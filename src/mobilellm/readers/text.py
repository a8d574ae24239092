"""Plain text and Markdown: one document a file.

for piece in text_pieces(Path("book.txt.gz")): ...
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.readers.reader import Reader, ReadSettings, Record, Span
from mobilellm.streams.compression import unpacked

WHOLE = 1 << 22  # characters of a text that is held at once


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file in pieces of a few megabytes. `UserError` for what is not UTF-8 or
    holds NUL bytes."""
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
                f"{path}: a NUL byte at character {characters + piece.index(chr(0))}: a binary "
                "file, not text"
            )
        characters += len(piece)
        if piece:
            yield piece
    if decoder.getstate()[0]:
        raise UserError(
            f"{path}: not UTF-8 text at byte {done}: it ends within a character", hint=wrong
        )


def spans(path: Path, size: int, wanted: int) -> list[Span]:
    """A text is one span, however large it is."""
    return [Span()]


def records(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
    """The one record of a text file, which is read to its end to see that it is sound."""
    if 0 not in span:
        return
    held: list[str] = []
    characters = 0
    for piece in text_pieces(path):
        characters += len(piece)
        if characters <= WHOLE:
            held.append(piece)
    if characters <= WHOLE:
        yield Record(str(path), 0, text="".join(held))
    else:
        yield Record(
            str(path), 0, stream=functools.partial(text_pieces, path), characters=characters
        )


READER = Reader(
    "text", (".txt", ".md", ".markdown", ".text", ""), "one document a file", spans, records
)
