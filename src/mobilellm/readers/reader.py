"""What a reader of a file type is, what it is asked for, and what it gives.

    READER = Reader("text", (".txt", ".md"), "one document a file", spans, records)

A span is a part of a file that can be read by itself: bytes of a plain file of lines, compressed
bytes of a compressed one, row groups of a Parquet file. Every record is in exactly one of the spans
that divide a file. What is wrong with a record is said by the record itself, so that the caller may
stop, or count it and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.errors import UserError
from mobilellm.streams.places import Place

MAX_BYTES = 1 << 27
"""Of one line, row or value, which are held as a whole."""
MAX_CHARACTERS = 1 << 25
"""Of one text in a larger file; as many may take `MAX_BYTES` of memory."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How records are read."""

    text_field: str = "text"
    """Field of a JSON line or a Parquet row that holds the text."""
    vocab_size: int | None = None
    """Ids of samples must be below it; none where samples cannot be taken."""
    sample_lengths: tuple[int, ...] = (2048, 2049)
    """Ids that a sample may have."""
    separator: str | None = None
    """What lies between the documents of a text file; none where a file is one document."""


@dataclass(frozen=True)
class Span:
    """From `start` up to `end` (none: the end of the file), in the reader's own unit."""

    start: int = 0
    end: int | None = None

    def __contains__(self, position: int) -> bool:
        return position >= self.start and (self.end is None or position < self.end)


def spans_between(bounds: list[int]) -> list[Span]:
    """The spans that begin at each of `bounds`; the last reaches to the end of the file."""
    return [Span(start, end) for start, end in zip(bounds, [*bounds[1:], None], strict=True)]


@dataclass(slots=True)
class Row:
    """One line, row or value of a file as it lies there, or what is wrong with it."""

    where: Callable[[], str]
    """The file, and the place in it; a function, since the number of a line may cost a pass."""
    key: int
    """Tells it apart within its file, the same however the file is divided."""
    value: Any = None
    fault: UserError | None = None


@dataclass(slots=True)
class Record:
    """One document or sample, or what is wrong with one."""

    where: str
    """The file, and the line or row in it; may be empty for a sound record."""
    key: int
    """Tells it apart within its file, the same however the file is divided."""
    text: str | None = None
    stream: Callable[[], Iterator[str]] | None = None
    """Reads a text that is too long to be held at once, piece by piece; `text` is none then."""
    characters: int = 0
    """The length of such a text."""
    ids: NDArray[np.uint32] | None = None
    """The ids of a sample, 1-D."""
    source: str | None = None
    """The source that a sample names."""
    fault: UserError | None = field(default=None)

    def pieces(self) -> Iterator[str]:
        """The text, in one piece or several."""
        return self.stream() if self.stream else iter([self.text or ""])

    def length(self) -> int:
        """Characters of the text."""
        return self.characters if self.stream else len(self.text or "")


@dataclass(frozen=True)
class Reader:
    """One file type."""

    name: str
    suffixes: tuple[str, ...]
    """Small letters, with the dot; "" for a name without one."""
    about: str
    """What such a file holds, in a few words."""
    spans: Callable[[Place, int, int], list[Span]]
    """(file, its size in bytes, bytes of text wanted in each) -> the spans that divide it."""
    records: Callable[[Place, Span, ReadSettings], Iterator[Record]]
    """The records of a span. `UserError` and `OSError` for a fault of the file as a whole."""
    rows: Callable[[Place, Span], Iterator[Row]] | None = None
    """The rows of a span with all their fields; none for plain text."""
    compressible: bool = True
    """Whether files of this type may be compressed as a whole (`mobilellm.streams.compression`)."""
    expansion: int = 1
    """Bytes of text to expect for one of the file, where it is not compressed as a whole."""
