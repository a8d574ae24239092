"""Parquet: one document a row, in a column of text. Needs pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm.errors import MissingPackageError, UserError, first_line
from mobilellm.readers.parquet_pages import page_sizes
from mobilellm.readers.reader import (
    MAX_BYTES,
    Reader,
    ReadSettings,
    Record,
    Row,
    Span,
    spans_between,
)
from mobilellm.streams.places import Place, open_bytes

MAX_PAGE = 1 << 28  # bytes that one page, or the dictionary of a column, may unpack to
HELD = 1 << 25  # bytes of text that are taken out of a file at once
ROWS = 256  # taken out at once, at most
TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


@contextlib.contextmanager
def open_parquet(path: Place) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile. `UserError` when pyarrow is absent or the file is damaged."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: .parquet needs the package pyarrow", hint="pip install 'mobilellm[data]'"
        ) from None
    source: Any = path if isinstance(path, Path) else open_bytes(path)
    try:
        # A column is read as its pages come, not as a whole.
        file = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a sound Parquet file ({first_line(error)})") from None
    try:
        yield file
    finally:
        file.close(force=True)


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """Row groups, joined until they have about `wanted` bytes of text."""
    try:
        with open_parquet(path) as file:
            groups, bounds, held = file.num_row_groups, [0], 0
            for group in range(groups):
                held += file.metadata.row_group(group).total_byte_size
                if held >= wanted and group + 1 < groups:
                    bounds.append(group + 1)
                    held = 0
    except MissingPackageError:
        raise
    except UserError:
        return [Span()]  # whoever reads it says what is wrong with it
    return spans_between(bounds)


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The texts of a column, in the row groups of a span."""
    name = settings.text_field
    with open_parquet(path) as file:
        if name not in file.schema_arrow.names:
            found = ", ".join(file.schema_arrow.names[:10])
            raise UserError(
                f"{path}: no column {name!r} (found {found})",
                hint="name the column with --text-field",
            )
        type_of = file.schema_arrow.field(name).type
        # A column of a dictionary has the type of its entries beside that of its indices.
        if str(getattr(type_of, "value_type", type_of)) not in TEXT:
            raise UserError(f"{path}: column {name!r} is {type_of}, not text")
        for number, row in _rows(path, file, span, [name]):
            where = f"{path}: row {number}"
            try:
                yield Record("", number, text=_text(row[name], f"{where}: column {name!r}"))
            except UserError as error:
                yield Record(where, number, fault=error)


def rows(path: Place, span: Span) -> Iterator[Row]:
    """The rows in the row groups of a span; lists and structs as JSON has them."""
    with open_parquet(path) as file:
        for number, row in _rows(path, file, span, file.schema_arrow.names):

            def where(number: int = number) -> str:
                return f"{path}: row {number}"

            try:
                yield Row(where, number, _plain(row, where))
            except UserError as error:
                yield Row(where, number, fault=error)


def _rows(
    path: Place, file: Any, span: Span, names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, counted from 1, fields) of each row."""
    import pyarrow

    end = file.num_row_groups if span.end is None else span.end
    number = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
    for group in range(span.start, end):
        try:
            count = _rows_at_once(path, file, group, names)
            for batch in file.iter_batches(batch_size=count, row_groups=[group], columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: row group {group} is damaged ({first_line(error)})") from None


def _rows_at_once(path: Place, file: Any, group: int, names: list[str]) -> int:
    """Rows whose text is no more than about `HELD` bytes. `UserError` for a page that is too large
    to be unpacked, before it is."""
    described = file.metadata.row_group(group)
    largest = 1
    with open_bytes(path) as raw:
        for place in range(described.num_columns):
            column = described.column(place)
            if column.path_in_schema.split(".")[0] not in names:
                continue
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            remote = not isinstance(path, Path)
            sizes = page_sizes(
                raw, start, start + column.total_compressed_size, most=2 if remote else None
            )
            if sizes.page > MAX_PAGE:
                raise UserError(
                    f"{path}: row group {group} has a page of {sizes.page:,} bytes in column "
                    f"{column.path_in_schema!r:.60}, the limit is {MAX_PAGE:,}",
                    hint="write the file with smaller pages, or shorter texts",
                )
            largest = max(largest, sizes.dictionary, sizes.value)
    return max(1, min(ROWS, HELD // largest))


def _text(value: Any, where: str) -> str:
    if value is None:
        raise UserError(f"{where} is empty (null)")
    if len(value) > MAX_BYTES:
        raise UserError(f"{where} has more than {MAX_BYTES:,} characters")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text at byte {error.start}") from None
    return str(value)


def _plain(value: Any, where: Any) -> Any:
    """A value as JSON would have it: bytes as text, fields without a value not there."""
    if isinstance(value, dict):
        return {name: _plain(one, where) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_plain(one, where) for one in value]
    return _text(value, where()) if isinstance(value, bytes) else value


READER = Reader(
    "parquet",
    (".parquet",),
    "one document a row",
    spans,
    records,
    rows,
    compressible=False,
    expansion=3,
)
