"""JSON lines: one document a line, in a field; or token ids (see `token_ids`).

{"text": "One document.", "id": 7}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.readers import token_ids
from mobilellm.readers.lines import lines, spans
from mobilellm.readers.reader import Reader, ReadSettings, Record, Span


def records(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The records of the lines that begin in a span; blank lines are none."""
    for number, position, line, fault in lines(path, span):
        if fault or not line.isspace():
            yield _record(line, fault, path, number, position, settings)


def _record(
    line: bytes,
    fault: str,
    path: Path,
    number: Callable[[], int],
    position: int,
    settings: ReadSettings,
) -> Record:
    """The record of one line. `number` is called only where it is shown, since it may cost a
    pass."""
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
            _without_text(record, row, f"{path}:{number()}", settings)
    except UserError as error:
        record.fault = error
        record.where = f"{path}:{number()}"
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


READER = Reader("jsonl", (".jsonl", ".ndjson"), "one document a line", spans, records)
