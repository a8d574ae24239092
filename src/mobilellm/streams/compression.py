"""Files that are compressed as a whole, unpacked in constant memory.

for position, block in unpacked(Path("wiki.jsonl.gz")): ...
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mobilellm.errors import MissingPackageError, UserError

COMPRESSED = (".gz", ".zst")
EXPANSION = 3  # bytes of text to expect of one that is compressed
BLOCK = 1 << 16  # compressed bytes unpacked at a time
UNPACKED = 1 << 22  # bytes that one step of gzip may give


def is_compressed(path: Path) -> bool:
    """Whether a file's name says that it is compressed as a whole."""
    return path.suffix.lower() in COMPRESSED


def inner_suffix(path: Path) -> str:
    """The suffix of a file's content, in small letters: ".jsonl" for "wiki.jsonl.gz"."""
    return Path(path.stem if is_compressed(path) else path.name).suffix.lower()


def unpacked(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of a file's content: where in the file the piece came from, and the
    piece, unpacked where compressed.

    The pieces depend on nothing but the file. `UserError` for a damaged or cut-off archive.
    """
    with open(path, "rb") as raw:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield from _gunzip(path, raw)
        elif suffix == ".zst":
            yield from _unzstd(path, raw)
        else:
            at = 0
            while block := raw.read(UNPACKED):
                yield at, block
                at += len(block)


def _gunzip(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, bytes]]:
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


def _unzstd(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, bytes]]:
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
            block = archive.decompress(data)
            if block:
                yield at, block
            left = archive.unused_data if archive.eof else b""
            at += len(data) - len(left)
            data = left
        if not begun or not archive.eof:
            raise UserError(f"{path}: damaged or cut-off zstd (it ends too early)")
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged or cut-off zstd ({error})") from None
