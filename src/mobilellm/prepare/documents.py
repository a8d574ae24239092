"""Documents out of files, in constant memory: text, Markdown, JSON lines and Parquet, the first three also compressed.

    for record in records(Path("wiki.jsonl.gz"), Span(0, None), ReadSettings()):
        record.where, record.text

A span is a part of a file that can be read by itself: bytes of a plain file of lines, compressed bytes of a compressed one (which
is unpacked from its start, but only the lines of the span are taken), row groups of a Parquet file. Every record is in exactly
one of the spans that divide a file. What is wrong with a record is said by the record itself, so that a reader may stop or
count it and go on.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.data.layout import sample_of
from mobilellm.errors import UserError

TEXT = (".txt", ".md", ".markdown", ".text", "")
LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst")
KINDS = "files end in .txt, .md or .jsonl, each also .gz or .zst, or in .parquet"
LONGEST_LINE = 1 << 30  # bytes of one JSON line
BLOCK = 1 << 16  # compressed bytes unpacked at a time
UNPACKED = 1 << 22  # bytes that one step of gzip may give
WHOLE = 1 << 22  # bytes of a text that is read at once


class MissingPackageError(UserError):
    """A file needs a package that is not installed, which is no fault of the file's: it is never skipped."""


@dataclass(frozen=True)
class Source:
    """A named set of files."""

    name: str
    """Told apart from other sources by it: letters, digits, "-" and "_"."""
    paths: list[Path]
    """Files, and folders that are walked for the known kinds."""
    weight: float | None = None
    """Share of the tokens when training, on any scale; none for as many as there are."""
    given: bool = False
    """Whether the name was chosen, and so holds also for samples that name a source of their own."""

    def files(self) -> list[Path]:
        """Every file, sorted within each folder. `UserError` when there is none."""
        found: list[Path] = []
        for path in self.paths:
            if path.is_dir():
                inside = sorted(
                    p
                    for p in path.rglob("*")
                    if p.is_file() and kind(p) and not p.name.startswith(".")
                )
                if not inside:
                    raise UserError(f"{path}: holds no text", hint=KINDS)
                found.extend(inside)
            elif path.is_file():
                if not kind(path):
                    raise UserError(f"{path}: of a kind that is not read", hint=KINDS)
                found.append(path)
            else:
                raise UserError(f"{path}: no such file or folder")
        return found


def kind(path: Path) -> str | None:
    """ "text", "lines", "parquet", or none for what is not read."""
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return "parquet"
    if suffix in COMPRESSED:
        suffix = Path(path.stem).suffix.lower()
    return "text" if suffix in TEXT else "lines" if suffix in LINES else None


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How records are read."""

    text_field: str = "text"
    """Field of a JSON line or a Parquet row that holds the text."""
    vocab_size: int | None = None
    """Ids of samples must be below it; none where samples cannot be taken."""
    sample_lengths: tuple[int, ...] = (2048, 2049)
    """Ids that a sample may have."""


@dataclass(frozen=True)
class Span:
    """From `start` up to `end` (none: the end of the file), in bytes or row groups."""

    start: int = 0
    end: int | None = None

    def __contains__(self, position: int) -> bool:
        return position >= self.start and (self.end is None or position < self.end)


@dataclass(slots=True)
class Record:
    """One document or sample, or what is wrong with one."""

    where: str
    """The file, and the line or row in it."""
    key: int
    """Tells it apart within its file, the same however the file is divided."""
    text: str | None = None
    path: Path | None = None
    """Of a text too long to be held at once: `text_pieces` reads it."""
    characters: int = 0
    """Of such a text."""
    ids: NDArray[np.uint32] | None = None
    """Of a sample."""
    source: str | None = None
    """That a sample names."""
    fault: UserError | None = field(default=None)


def records(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The records of a span of a file."""
    try:
        which = kind(path)
        if which == "text":
            if 0 in span:
                yield _text(path)
        elif which == "parquet":
            yield from _parquet(path, span, settings)
        else:
            for number, position, line, fault in _lines(path, span):
                if fault or not line.isspace():
                    yield _row(line, fault, path, number, position, settings)
    except MissingPackageError:
        raise
    except UserError as error:
        yield Record(str(path), -1, fault=error)
    except OSError as error:
        yield Record(
            str(path), -1, fault=UserError(f"{path}: cannot be read ({error.strerror or error})")
        )


def _row(
    line: bytes, fault: str, path: Path, number: Any, position: int, settings: ReadSettings
) -> Record:
    """The record of one line. `number` is asked for its value only when it is to be told."""
    record = Record("", position)
    try:
        if fault:
            raise UserError(f"{path}:{number()}: {fault}")
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}:{number()}: broken JSON ({error})") from None
        text = row.get(settings.text_field) if isinstance(row, dict) else None
        if isinstance(text, str):
            record.text = text
        else:
            _foreign(record, row, f"{path}:{number()}", settings)
    except UserError as error:
        record.fault = error
        record.where = f"{path}:{number()}"
    return record


def _foreign(record: Record, row: Any, where: str, settings: ReadSettings) -> None:
    """A line without a text: a sample of token ids, or a `UserError`."""
    name = settings.text_field
    if isinstance(row, dict) and "token_ids" in row and name not in row:
        if settings.vocab_size is None:
            raise UserError(
                f"{where}: token ids, and no tokenizer named", hint="name theirs with --tokenizer"
            )
        record.ids, record.source = sample_of(row, where, settings.vocab_size)
        if len(record.ids) not in settings.sample_lengths:
            allowed = " or ".join(map(str, settings.sample_lengths))
            raise UserError(
                f"{where}: {len(record.ids)} ids, a sample has {allowed}",
                hint="or give --sequence-length",
            )
    elif isinstance(row, dict) and name in row:
        raise UserError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text")
    else:
        keys = ", ".join(list(row)[:10]) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where}: no field {name!r} (found {keys})", hint="name the field with --text-field"
        )


def _lines(path: Path, span: Span) -> Iterator[tuple[Any, int, bytes, str]]:
    """(line number, position, line, fault) of the lines that begin in a span; the number is a function, since it may cost."""
    if path.suffix.lower() in COMPRESSED:
        yield from _compressed_lines(path, span)
        return
    with open(path, "rb") as file:
        position = span.start
        if position:
            file.seek(position - 1)
            while (piece := file.readline(1 << 24)) and not piece.endswith(b"\n"):
                position += len(piece)
            position = file.tell()
        before, count = -1, 0

        def number() -> int:
            nonlocal before
            if before < 0:
                before = _newlines(path, span.start) if span.start else 0
            return before + count

        while span.end is None or position < span.end:
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            count += 1
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                rest = len(line)
                while (piece := file.readline(1 << 24)) and not piece.endswith(b"\n"):
                    rest += len(piece)
                yield number, position, b"", f"a line of more than {LONGEST_LINE} bytes"
                position += rest + len(piece)
                continue
            yield number, position, line, ""
            position += len(line)


def _newlines(path: Path, end: int) -> int:
    """Lines that begin before byte `end`, which is where a span starts: the part before it may end within a line."""
    count = 0
    with open(path, "rb") as file:
        left = end
        last = b"\n"
        while left and (block := file.read(min(left, 1 << 22))):
            count += block.count(b"\n")
            left -= len(block)
            last = block[-1:]
    return count if last == b"\n" else count + 1


def _compressed_lines(path: Path, span: Span) -> Iterator[tuple[Any, int, bytes, str]]:
    number, start, begun_at, parts, held = 0, 0, 0, list[bytes](), 0
    try:
        for at, block in unpacked(path):
            if not parts:
                begun_at = at
                if span.end is not None and at >= span.end:
                    return
            if b"\n" not in block:
                if held <= LONGEST_LINE:
                    parts.append(block)
                held += len(block)
                continue
            whole, rest = block.rsplit(b"\n", 1)
            first = True
            for piece in whole.split(b"\n"):
                number += 1
                line, where = (b"".join([*parts, piece]), begun_at) if first else (piece, at)
                length = (held + len(piece) if first else len(piece)) + 1
                if where in span:
                    if length > LONGEST_LINE:
                        yield (
                            (lambda n=number: n),
                            start,
                            b"",
                            f"a line of more than {LONGEST_LINE} bytes",
                        )
                    elif line:
                        yield (lambda n=number: n), start, line, ""
                start += length
                first = False
            parts, held, begun_at = ([rest], len(rest), at) if rest else ([], 0, at)
        if parts and begun_at in span:
            yield (lambda: number + 1), start, b"".join(parts), ""
    except MissingPackageError:
        raise
    except UserError as error:
        if span.end is None:  # told once, by whoever reads to the end
            yield (
                (lambda: number + 1),
                start,
                b"",
                f"{error.what.removeprefix(f'{path}: ')}: nothing from here on can be read",
            )


def unpacked(path: Path) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) of a file's content: where in the file the piece came from, and the piece, unpacked where compressed.

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


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of a few megabytes. `UserError` for what is not UTF-8 or holds NUL bytes."""
    decoder, done, characters = codecs.getincrementaldecoder("utf-8")(), 0, 0
    wrong = "is it binary, or in another encoding?"
    for _, block in unpacked(path):
        try:
            piece = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 text at byte {done + error.start}", hint=wrong
            ) from None
        done += len(block) - len(decoder.getstate()[0])
        if "\0" in piece:
            raise UserError(
                f"{path}: a NUL byte at character {characters + piece.index(chr(0))}: a binary file, not text"
            )
        characters += len(piece)
        if piece:
            yield piece
    if decoder.getstate()[0]:
        raise UserError(
            f"{path}: not UTF-8 text at byte {done}: it ends within a character", hint=wrong
        )


def _text(path: Path) -> Record:
    """The one record of a text file, read to its end to see that it is sound."""
    held: list[str] = []
    characters = 0
    for piece in text_pieces(path):
        characters += len(piece)
        if characters <= WHOLE:
            held.append(piece)
    if characters <= WHOLE:
        return Record(str(path), 0, text="".join(held))
    return Record(str(path), 0, path=path, characters=characters)


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. `UserError` when pyarrow is absent or the file is none."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: .parquet needs the package pyarrow", hint="pip install 'mobilellm[data]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a sound Parquet file ({str(error).splitlines()[0][:200]})"
        ) from None


def _parquet(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
    file = open_parquet(path)
    name = settings.text_field
    if name not in file.schema_arrow.names:
        found = ", ".join(file.schema_arrow.names[:10])
        raise UserError(
            f"{path}: no column {name!r} (found {found})", hint="name the column with --text-field"
        )
    kind_of = str(file.schema_arrow.field(name).type)
    if kind_of not in ("string", "large_string", "string_view"):
        raise UserError(f"{path}: column {name!r} is {kind_of}, not text")
    end = file.num_row_groups if span.end is None else span.end
    number = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    for group in range(span.start, end):
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[name]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if text is None:
                        fault = UserError(f"{path}: row {number}: column {name!r} is empty (null)")
                        yield Record(f"{path}: row {number}", number, fault=fault)
                    else:
                        yield Record("", number, text=text)
        except (OSError, ValueError) as error:  # pyarrow's own errors are among these
            raise UserError(
                f"{path}: row group {group} is damaged ({str(error).splitlines()[0][:200]})"
            ) from None
