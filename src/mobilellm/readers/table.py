"""The file types that are read, and which of them a file is.

    reader_of(Path("wiki.jsonl.gz")).name                       # "jsonl"
    for record in records(Path("wiki.jsonl.gz"), Span(), ReadSettings()):
        record.where, record.text

A new file type is a module with a `READER`, and its line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mobilellm.errors import MissingPackageError, UserError
from mobilellm.readers import columns, json_values, jsonl, parquet, text
from mobilellm.readers.reader import Reader, ReadSettings, Record, Row, Span
from mobilellm.streams.compression import COMPRESSED, EXPANSION, inner_suffix, is_compressed
from mobilellm.streams.places import Place

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        text.READER,
        jsonl.READER,
        json_values.READER,
        columns.READER,
        parquet.READER,
    )
}


def reader_of(path: Place) -> Reader | None:
    """The reader of a file, by its name; none for what is not read."""
    suffix = inner_suffix(path)
    for reader in READERS.values():
        if suffix in reader.suffixes and (reader.compressible or not is_compressed(path)):
            return reader
    return None


def known_files() -> str:
    """A line that names the files that are read."""
    types = "; ".join(
        f"{', '.join(filter(None, reader.suffixes))} ({reader.about})"
        for reader in READERS.values()
    )
    whole = ", ".join(reader.name for reader in READERS.values() if reader.compressible)
    return f"these are read: {types}; {whole} also as {', '.join(COMPRESSED)}"


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """How a file of `size` bytes is divided, into about `wanted` bytes of text each."""
    return _known(path).spans(path, size, wanted)


def text_size(path: Place, size: int) -> int:
    """About how many bytes of text a file of `size` bytes has."""
    return size * (EXPANSION if is_compressed(path) else _known(path).expansion)


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The records of a span of a file, a fault of the file itself among them.

    `MissingPackageError` where the file needs a package that is not installed.
    """
    try:
        yield from _known(path).records(path, span, settings)
    except MissingPackageError:
        raise
    except UserError as error:
        yield Record(str(path), -1, fault=error)
    except OSError as error:
        fault = UserError(f"{path}: cannot be read ({error.strerror or error})")
        yield Record(str(path), -1, fault=fault)


def rows(path: Place) -> Iterator[Row]:
    """The rows of a file with the fields that they have.

    `UserError` for a file of text, which has none, and for a fault of the file as a whole.
    """
    reader = _known(path)
    if reader.rows is None:
        raise UserError(f"{path}: text without fields", hint="give lines of JSON, or a table")
    try:
        yield from reader.rows(path, Span())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _known(path: Place) -> Reader:
    reader = reader_of(path)
    if reader is None:
        raise UserError(f"{path}: of a kind that is not read", hint=known_files())
    return reader
