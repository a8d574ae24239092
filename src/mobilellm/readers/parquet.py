"""Parquet: one document a row, in a column of text. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm.errors import MissingPackageError, UserError, first_line
from mobilellm.readers.reader import (
    Reader,
    ReadSettings,
    Record,
    Span,
    spans_between,
)


def open_parquet(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. `UserError` when pyarrow is absent or the file is damaged."""
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
        raise UserError(f"{path}: not a sound Parquet file ({first_line(error)})") from None


def spans(path: Path, size: int, wanted: int) -> list[Span]:
    """Row groups, joined until they have about `wanted` bytes of text."""
    try:
        file = open_parquet(path)
    except MissingPackageError:
        raise
    except UserError:
        return [Span()]  # whoever reads it says what is wrong with it
    groups, bounds, held = file.num_row_groups, [0], 0
    for group in range(groups):
        held += file.metadata.row_group(group).total_byte_size
        if held >= wanted and group + 1 < groups:
            bounds.append(group + 1)
            held = 0
    return spans_between(bounds)


def records(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The texts of a column, in the row groups of a span."""
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
            raise UserError(f"{path}: row group {group} is damaged ({first_line(error)})") from None


READER = Reader(
    "parquet", (".parquet",), "one document a row", spans, records, compressible=False, expansion=3
)
