"""JSON lines: one document a line, in a field; or token ids (see `token_ids`).

{"text": "One document.", "id": 7}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.readers import token_ids
from mobilellm.readers.lines import lines, spans
from mobilellm.readers.reader import Reader, ReadSettings, Record, Row, Span
from mobilellm.streams.places import Place


def rows(path: Place, span: Span) -> Iterator[Row]:
    """The lines that begin in a span; blank lines are none."""
    for number, position, line, fault in lines(path, span):
        if not fault and line.isspace():
            continue

        def where(number: Any = number) -> str:
            return f"{path}:{number()}"

        row = Row(where, position)
        try:
            if fault:
                raise UserError(f"{where()}: {fault}")
            row.value = parsed(line)
        except UserError as error:
            row.fault = error
        except ValueError as error:
            row.fault = UserError(f"{where()}: broken JSON ({error})")
        yield row


def parsed(line: bytes | bytearray) -> Any:
    """The value of a line. `ValueError` for broken JSON.

    NaN and Infinity, which Python and pandas write, are no JSON, and no fault of a line.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
        except (ValueError, RecursionError):
            value = None
        if value is None:
            raise
        return value


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The records of the lines that begin in a span; blank lines are none."""
    for row in rows(path, span):
        yield record_of(row, settings)


def record_of(row: Row, settings: ReadSettings) -> Record:
    """The record of a row. Its place is asked for only where it is shown."""
    record = Record("", row.key)
    try:
        if row.fault is not None:
            raise row.fault
        value = row.value
        text = value.get(settings.text_field) if isinstance(value, dict) else None
        if isinstance(text, str):
            record.text = text
        else:
            _without_text(record, value, row.where(), settings)
    except UserError as error:
        record.fault = error
        record.where = row.where()
    return record


def _without_text(record: Record, row: Any, where: str, settings: ReadSettings) -> None:
    """Fill the record of a line that holds no text: a sample of token ids, or a `UserError`."""
    name = settings.text_field
    if token_ids.holds_ids(row, settings):
        token_ids.fill(record, row, where, settings)
    elif isinstance(row, dict) and name in row:
        raise UserError(f"{where}: field {name!r} is {type(row[name]).__name__}, not text")
    else:
        keys = ", ".join(list(row)[:10]) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where}: no field {name!r} (found {keys})", hint="name the field with --text-field"
        )


READER = Reader("jsonl", (".jsonl", ".ndjson"), "one document a line", spans, records, rows)
