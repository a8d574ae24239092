"""Files that are compressed as a whole, unpacked in pieces of a bounded size.

    for position, block in unpacked(Path("wiki.jsonl.gz")): ...

However far an archive unpacks (16 KB of zstd can be 512 MB), no more than some tens of megabytes of
it are held at a time.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mobilellm.errors import MissingPackageError, UserError
from mobilellm.streams.places import Place, open_bytes

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
EXPANSION = 3  # bytes of text to expect of one that is compressed
BLOCK = 1 << 16  # compressed bytes unpacked at a time
UNPACKED = 1 << 22  # bytes of a piece
ZSTD_STEP = 1 << 10  # compressed bytes given to zstd at once: a block of 4 bytes may be 128 KiB
XZ_MEMORY = 256 << 20  # bytes that unpacking .xz may take; its largest preset needs 65 MiB


def is_compressed(path: Place) -> bool:
    """Whether a file's name says that it is compressed as a whole."""
    return path.suffix.lower() in COMPRESSED


def inner_suffix(path: Place) -> str:
    """The suffix of a file's content, in small letters: ".jsonl" for "wiki.jsonl.gz"."""
    return Path(path.stem if is_compressed(path) else path.name).suffix.lower()


def unpacked(path: Place) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of a file's content: where in the file the piece came from, and the
    piece, unpacked where compressed, of no more than `UNPACKED` bytes.

    The pieces depend on nothing but the file. `UserError` for a damaged or cut-off archive.
    """
    with open_bytes(path) as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield from _gunzip(path, raw)
        elif suffix == ".zst":
            for at, block in _unzstd(path, raw):
                for start in range(0, len(block), UNPACKED):
                    yield at, block[start : start + UNPACKED]
        elif suffix == ".bz2":
            yield from _by_steps(path, raw, "bzip2", bz2.BZ2Decompressor)
        elif suffix == ".xz":
            yield from _by_steps(path, raw, "xz", _xz)
        else:
            at = 0
            while block := raw.read(UNPACKED):
                yield at, block
                at += len(block)


def _gunzip(path: Place, raw: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    archive, at, data = zlib.decompressobj(31), 0, b""
    begun = members = 0
    try:
        while data or (data := raw.read(BLOCK)):
            if archive.eof or not begun:
                if members and not data.strip(
                    b"\0"
                ):  # padding behind the last member, as tapes and some uploads leave it
                    at, data = at + len(data), b""
                    continue
                archive, begun = zlib.decompressobj(31), 1
            block = archive.decompress(data, UNPACKED)
            if block:
                yield at, block
            left = archive.unused_data if archive.eof else archive.unconsumed_tail
            members += archive.eof
            at += len(data) - len(left)
            data = left
        if (begun and not archive.eof) or not members:
            raise UserError(f"{path}: damaged or cut-off gzip (it ends too early)")
    except zlib.error as error:
        raise UserError(f"{path}: damaged or cut-off gzip ({error})") from None


def _unzstd(path: Place, raw: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Pieces as zstd gives them: of up to 32 MiB, where an archive is made to unpack far."""
    try:
        import zstandard
    except ImportError:
        raise MissingPackageError(
            f"{path}: .zst needs the package zstandard", hint="pip install 'mobilellm[data]'"
        ) from None
    make = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    archive, at, data, begun = make(), 0, b"", False
    try:
        while data or (data := raw.read(BLOCK >> 2)):
            if archive.eof:
                archive = make()
            begun = True
            left, held, size = b"", list[bytes](), 0
            for start in range(0, len(data), ZSTD_STEP):
                held.append(archive.decompress(data[start : start + ZSTD_STEP]))
                size += len(held[-1])
                if size > UNPACKED:  # far more than text gives
                    yield at, b"".join(held)
                    held, size = [], 0
                if archive.eof:
                    left = archive.unused_data + data[start + ZSTD_STEP :]
                    break
            if size:
                yield at, b"".join(held)
            at += len(data) - len(left)
            data = left
        if not begun or not archive.eof:
            raise UserError(f"{path}: damaged or cut-off zstd (it ends too early)")
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged or cut-off zstd ({error})") from None


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)


def _by_steps(
    path: Place, raw: IO[bytes], kind: str, make: Callable[[], Any]
) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file of bzip2 or xz, which is one stream or several end to end."""
    at, data, archive = 0, b"", make()
    begun = streams = False
    try:
        while data or (data := raw.read(BLOCK)):
            if not begun and streams and not data.strip(b"\0"):  # padding behind a stream
                at, data = at + len(data), b""
                continue
            begun = True
            given = data
            while not archive.eof:
                block = archive.decompress(given, UNPACKED)
                given = b""
                if block:
                    yield at, block
                if archive.needs_input:
                    break
            left = b""
            if archive.eof:
                left, archive, begun, streams = archive.unused_data, make(), False, True
            at += len(data) - len(left)
            data = left
        if begun or not streams:
            raise UserError(f"{path}: damaged or cut-off {kind} (it ends too early)")
    except (OSError, lzma.LZMAError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system
        raise UserError(f"{path}: damaged or cut-off {kind} ({error})") from None
