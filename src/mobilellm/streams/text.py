"""The characters of a file in pieces of a few megabytes.

for piece in text_pieces(Path("book.txt.gz")): ...
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from mobilellm.errors import UserError
from mobilellm.streams.compression import unpacked
from mobilellm.streams.places import Place

MARK = "\ufeff"
"""A byte order mark, which is no text where a file begins with it."""


def text_pieces(path: Place) -> Iterator[str]:
    """The text of a file in pieces of a few megabytes, without a byte order mark at its start.
    `UserError` for what is not UTF-8 or holds NUL bytes."""
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
        first = not characters
        characters += len(piece)
        piece = piece.removeprefix(MARK) if first else piece
        if piece:
            yield piece
    if decoder.getstate()[0]:
        raise UserError(
            f"{path}: not UTF-8 text at byte {done}: it ends within a character", hint=wrong
        )
