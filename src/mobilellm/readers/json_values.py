"""JSON that is no file of lines by its name: an array of objects, or objects one after another.

    [{"text": "One document."}, {"text": "Another."}]

Most files of this name are lines all the same (C4's and Dolma's .json.gz); those are read as lines.
The values of others are taken out one by one, of a file of any size.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from mobilellm.errors import MissingPackageError, UserError
from mobilellm.readers import jsonl, lines
from mobilellm.readers.reader import MAX_CHARACTERS, Reader, ReadSettings, Record, Row, Span
from mobilellm.streams.compression import unpacked
from mobilellm.streams.places import Place
from mobilellm.streams.text import MARK

FIRST_LINE = 1 << 22  # bytes within which a file of lines has its first line's end
SPACE = re.compile(r"[ \t\r\n]*")


def are_lines(path: Place) -> bool:
    """Whether a file's first line is a value by itself. False for one that cannot be read."""
    begun = b""
    try:
        for _, block in unpacked(path):
            begun += block
            line, end, _ = begun.removeprefix(MARK.encode()).lstrip(b" \t\r\n").partition(b"\n")
            if end or len(begun) > FIRST_LINE:
                break
        else:
            end = b"\n"  # of the file
        if not end or line[:1] == b"[":
            return False
        jsonl.parsed(line)
    except MissingPackageError:
        raise
    except (UserError, OSError, ValueError):
        return False
    return True


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """Those of a file of lines; any other is one."""
    return lines.spans(path, size, wanted) if are_lines(path) else [Span()]


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The records of the lines, or of the values."""
    for row in rows(path, span):
        yield jsonl.record_of(row, settings)


def rows(path: Place, span: Span) -> Iterator[Row]:
    """The lines that begin in the span, or the values of a file that is one span."""
    if are_lines(path):
        yield from jsonl.rows(path, span)
        return
    number = 0
    try:
        for value in _values(path):
            number += 1
            yield Row(_place(path, number), number, value)
    except MissingPackageError:
        raise
    except (UserError, ValueError, RecursionError) as error:
        what = error.what.removeprefix(f"{path}: ") if isinstance(error, UserError) else str(error)
        where = f"{path}: value {number + 1}"
        fault = UserError(f"{where}: broken JSON ({what}): nothing from here on can be read")
        yield Row(lambda: where, number + 1, fault=fault)


def _place(path: Place, number: int) -> Any:
    return lambda: f"{path}: value {number}"


def _characters(path: Place) -> Iterator[str]:
    decoder, first = codecs.getincrementaldecoder("utf-8")(), True
    for _, block in unpacked(path):
        piece = decoder.decode(block)
        if piece:
            yield piece.removeprefix(MARK) if first else piece
            first = False
    decoder.decode(b"", final=True)


def _values(path: Place) -> Iterator[Any]:
    """The values of an array, or one after another. `ValueError` where the file is broken."""
    pieces = _characters(path)
    held, at, ended = "", 0, False

    def more() -> bool:
        nonlocal held, at, ended
        wanted = max(1, len(held) - at)  # twice what was too little
        parts = [held[at:]]
        got = 0
        while got < wanted and not ended:
            piece = next(pieces, None)
            ended = piece is None
            parts.append(piece or "")
            got += len(parts[-1])
        held, at = "".join(parts), 0
        return got > 0

    def skip() -> str:
        """The first character that is no space, or nothing at the file's end."""
        nonlocal at
        while True:
            found = SPACE.match(held, at)
            assert found is not None
            at = found.end()
            if at < len(held):
                return held[at]
            if not more():
                return ""

    decode = json.JSONDecoder().raw_decode
    is_array = skip() == "["
    at += is_array
    count = 0
    while first := skip():
        if is_array and first == "]":
            at += 1
            if skip():
                raise ValueError("more behind the array's end")
            return
        if is_array and count:
            if first != ",":
                raise ValueError("no comma between two values")
            at += 1
            skip()
        count += 1
        while True:
            try:
                value, end = decode(held, at)
                length = end - at
                if end < len(held) or not more():  # a number may go on in the next piece
                    end = at + length
                    break
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(held) - 32 or "string" in error.msg
                if len(held) - at > MAX_CHARACTERS:
                    raise ValueError(
                        f"a value of more than {MAX_CHARACTERS:,} characters, or no end"
                    ) from None
                if not cut_off or not more():
                    raise ValueError(f"{error.msg} at character {error.pos - at}") from None
        if any(held.find(escape, at, end) >= 0 for escape in ("\\ud", "\\uD")):
            json.dumps(value, ensure_ascii=False).encode()  # a half of a surrogate pair is no text
        at = end
        yield value
    if is_array:
        raise ValueError("the array has no end")


READER = Reader("json", (".json",), "lines, or an array of objects", spans, records, rows)
