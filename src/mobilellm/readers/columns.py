"""Tables as text, .csv and .tsv: one document a row, in a column that the first row names.

id,text
7,"One document, which may
have several lines."
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from mobilellm.errors import UserError
from mobilellm.readers.reader import MAX_CHARACTERS, Reader, ReadSettings, Record, Row, Span
from mobilellm.streams.compression import inner_suffix
from mobilellm.streams.places import Place
from mobilellm.streams.text import text_pieces


class _Lines:
    """The lines of a file, and how many characters the present row has had."""

    def __init__(self, path: Place) -> None:
        self.path, self.row = path, 0

    def __iter__(self) -> Iterator[str]:
        held = list[str]()
        for piece in text_pieces(self.path):
            lines = piece.split("\n")
            for line in lines[:-1]:
                yield self._counted("".join([*held, line, "\n"]))
                held.clear()
            held.append(lines[-1])
            if sum(map(len, held)) > MAX_CHARACTERS:
                self._counted("".join(held))
        if last := "".join(held):
            yield self._counted(last)

    def _counted(self, line: str) -> str:
        self.row += len(line)
        if self.row > MAX_CHARACTERS:
            raise UserError(
                f"{self.path}: a row of more than {MAX_CHARACTERS:,} characters",
                hint="is there a quotation mark without a second one?",
            )
        return line


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """A table is one span: where a row begins is only known from its start."""
    return [Span()]


def rows(path: Place, span: Span) -> Iterator[Row]:
    """The rows behind the first, as dictionaries of all columns. `UserError` for what is no
    table."""
    if 0 not in span:
        return
    csv.field_size_limit(MAX_CHARACTERS)
    lines = _Lines(path)
    reader = csv.reader(lines, delimiter="\t" if inner_suffix(path) == ".tsv" else ",", strict=True)
    names: list[str] | None = None
    number = 0
    while True:
        lines.row = 0
        try:
            found = next(reader, None)
        except csv.Error as error:
            if names is None:
                raise UserError(f"{path}: no first row of columns ({error})") from None
            number += 1
            yield _row(path, number, reader.line_num, fault=str(error))
            continue
        if found is None:
            return
        if names is None:
            names = found
            continue
        if not found:
            continue  # a blank line
        number += 1
        if len(found) != len(names):
            fault = f"{len(found)} fields where the first row has {len(names)}"
            yield _row(path, number, reader.line_num, fault=fault)
            continue
        yield _row(path, number, reader.line_num, dict(zip(names, found, strict=True)))


def _row(path: Place, number: int, line: int, value: Any = None, fault: str = "") -> Row:
    def where() -> str:
        return f"{path}: row {number} (line {line})"

    return Row(where, number, value, UserError(f"{where()}: {fault}") if fault else None)


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The texts of a column."""
    name = settings.text_field
    for row in rows(path, span):
        if row.fault is not None:
            yield Record(row.where(), row.key, fault=row.fault)
            continue
        if name not in row.value:
            found = ", ".join(list(row.value)[:10])
            raise UserError(
                f"{path}: no column {name!r} (found {found})",
                hint="name the column with --text-field",
            )
        yield Record("", row.key, text=row.value[name])


READER = Reader("table", (".csv", ".tsv"), "one document a row", spans, records, rows)
