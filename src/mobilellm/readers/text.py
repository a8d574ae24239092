"""Plain text and Markdown: one document a file, or several with a separator between them.

for record in records(Path("book.txt.gz"), Span(), ReadSettings(separator="<|endoftext|>")): ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from mobilellm.errors import UserError
from mobilellm.readers.reader import MAX_CHARACTERS, Reader, ReadSettings, Record, Span
from mobilellm.streams.places import Place
from mobilellm.streams.text import text_pieces

WHOLE = 1 << 22  # characters of a text that is held at once
BLANK_LINES = "blank-lines"
"""The separator that is one or more lines without anything but spaces."""
BLANK = re.compile(r"\n[ \t\r\f\v]*\n\s*")


def spans(path: Place, size: int, wanted: int) -> list[Span]:
    """A text is one span, however large it is."""
    return [Span()]


def records(path: Place, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The one record of a text file, which is read to its end to see that it is sound; or those
    between its separators."""
    if 0 not in span:
        return
    if settings.separator:
        yield from _divided(path, settings.separator)
        return
    held: list[str] = []
    characters = 0
    for piece in text_pieces(path):
        characters += len(piece)
        if characters <= WHOLE:
            held.append(piece)
        else:
            held.clear()
    if characters <= WHOLE:
        yield Record(str(path), 0, text="".join(held))
    else:
        yield Record(
            str(path), 0, stream=functools.partial(text_pieces, path), characters=characters
        )


def _divided(path: Place, separator: str) -> Iterator[Record]:
    """The documents between separators, without the line ends beside these. What follows the last
    separator is a document unless it is empty."""
    number, held, skipping = 0, "", False
    pieces = text_pieces(path)
    while True:
        piece = next(pieces, None)
        held += piece or ""
        if separator == BLANK_LINES:
            # A run of spaces at the end may go on in the next piece.
            parts, start = list[str](), 0
            for found in BLANK.finditer(held):
                if piece is None or found.end() < len(held):
                    parts.append(held[start : found.start()])
                    start = found.end()
            parts.append(held[start:])
        else:
            parts = held.split(separator)
        last = parts.pop()
        if piece is None and last.strip("\r\n"):
            parts.append(last)
        for text in parts:
            if not skipping:
                number += 1
                yield from _document(path, number, text, separator)
            skipping = False
        held = last
        if piece is None:
            return
        if len(held) > MAX_CHARACTERS:
            if not skipping:
                number += 1
                where = f"{path}: document {number}"
                fault = UserError(
                    f"{where}: more than {MAX_CHARACTERS:,} characters without the separator",
                    hint="is it the right one? Without --separator a file may be of any length",
                )
                yield Record(where, number, fault=fault)
            # What may be the beginning of a separator is kept.
            held, skipping = held[-max(len(separator), 64) :], True


def _document(path: Place, number: int, text: str, separator: str) -> Iterator[Record]:
    where = f"{path}: document {number}"
    if separator == BLANK_LINES:
        text = text.strip("\r\n")
        if text.strip():
            yield Record(where, number, text=text)
        return
    for end in ("\n", "\r"):
        text = text.removesuffix(end)
    text = text.removeprefix("\r").removeprefix("\n")
    yield Record(where, number, text=text)


READER = Reader(
    "text", (".txt", ".md", ".markdown", ".text", ""), "one document a file", spans, records
)
