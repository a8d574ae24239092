"""Arrays of tokens laid end to end, read by position without loading them.

stream = TokenFolder.open(Path("DATA")).tokens("train")
stream.read(1000, 257)            # 257 tokens, across shard borders where need be
stream.documents(1000, 257)       # which document each belongs to
stream.trained(1000, 257)         # which of them are trained on
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.shard_file import ENDS


class Part(NamedTuple):
    """One array of a stream."""

    tokens: NDArray[Any]
    """(T,)"""
    ends: NDArray[Any]
    """The position just after each document's last token, ascending, (documents,)."""
    mask: NDArray[np.uint8] | None = None
    """A bit a token, packed: whether it is trained on. None where all are."""


class Beside(Protocol):
    """Arrays that were computed of a stream's samples, a row for each; the samples then lie at
    fixed places, at multiples of their length."""

    @property
    def rows(self) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]:
        """Shape and type of a row, for each array."""
        ...

    def read(self, sample: int) -> tuple[NDArray[Any], ...]:
        """The rows of a sample, counted from the beginning of the stream."""
        ...


class TokenStream:
    """Arrays laid end to end, read by position without loading them; each is opened when it is
    first read."""

    def __init__(
        self,
        lengths: Iterable[int],
        opener: Callable[[int], Part],
        row: int = 0,
        masked: bool = False,
    ) -> None:
        """`opener(i)` gives part i, of `lengths[i]` tokens.

        With `row`, the stream is rows of that many tokens, and a sample is taken from within one
        row. `masked` says that some part has tokens that are not trained on.
        """
        self.starts = np.concatenate(([0], np.cumsum(np.fromiter(lengths, dtype=np.int64)))).astype(
            np.int64
        )
        """Position of each part's first token, and the total."""
        self.row, self.masked = row, masked
        self.beside: Beside | None = None
        """What else there is to read of each sample."""
        self._bounds: list[int] = self.starts.tolist()
        self._opener = opener
        self._open: dict[int, Part] = {}

    @classmethod
    def of(
        cls, parts: Iterable[NDArray[Any]], ends: Iterable[NDArray[Any]] = (), row: int = 0
    ) -> TokenStream:
        """A stream over these arrays, with the ends of the documents in each where they are
        known."""
        parts, known = list(parts), list(ends)
        none = np.empty(0, dtype=ENDS)

        def opener(i: int) -> Part:
            return Part(parts[i], known[i] if known else none)

        return cls([len(p) for p in parts], opener, row)

    def __len__(self) -> int:
        return self._bounds[-1]

    @property
    def parts(self) -> list[NDArray[Any]]:
        """The arrays, all opened."""
        return [self._opener(i).tokens for i in range(len(self._bounds) - 1)]

    def _part(self, i: int) -> Part:
        part = self._open.get(i)
        if part is None:
            # As plain arrays over the same mapping: slicing an np.memmap costs several times as
            # much.
            found = self._opener(i)
            mask = None if found.mask is None else np.asarray(found.mask)
            part = self._open[i] = Part(np.asarray(found.tokens), np.asarray(found.ends), mask)
        return part

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from position `start`, or fewer at the end of the stream."""
        i = bisect.bisect_right(self._bounds, start) - 1
        if (
            i in self._open and start + count <= self._bounds[i + 1]
        ):  # the common case, which is to cost next to nothing
            return self._open[i][0][start - self._bounds[i] : start - self._bounds[i] + count]
        pieces = [self._part(i)[0][a:b] for i, a, b in self._pieces(start, count)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)

    def trained(self, start: int, count: int) -> NDArray[np.bool_]:
        """Whether each token that `read` gives is trained on."""
        pieces: list[NDArray[np.bool_]] = []
        for i, a, b in self._pieces(start, count):
            mask = self._part(i).mask
            if mask is None:
                pieces.append(np.ones(b - a, dtype=bool))
            else:
                bits = np.unpackbits(mask[a // 8 : -(-b // 8)])
                pieces.append(bits[a % 8 : a % 8 + b - a].astype(bool))
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=bool)

    def documents(self, start: int, count: int) -> NDArray[np.int32]:
        """Which document each token that `read` gives belongs to: 0 for the first one's, 1, ...;
        an EOS belongs to what it ends."""
        steps: list[NDArray[Any]] = []
        for i, a, b in self._pieces(start, count):
            ends = self._part(i)[1]
            first, last = np.searchsorted(ends, (a, b - 1), side="right")
            step = np.bincount(ends[first:last].astype(np.int64) - a, minlength=b - a)
            step[0] += bool(steps)  # no document spans two parts
            steps.append(step)
        return (
            np.cumsum(np.minimum(np.concatenate(steps), 1), dtype=np.int32)
            if steps
            else np.empty(0, dtype=np.int32)
        )

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(part, from, to) of the stretch of `count` tokens from `start`."""
        end = min(start + count, len(self))
        i = bisect.bisect_right(self._bounds, start) - 1
        while start < end:
            base, stop = self._bounds[i], min(end, self._bounds[i + 1])
            if stop > start:
                yield i, start - base, stop - base
            start, i = stop, i + 1

    def document_lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document, (documents,), a part of the stream at a time."""
        for i in range(len(self._bounds) - 1):
            ends = self._part(i)[1].astype(np.int64)
            yield ends - np.concatenate(([0], ends[:-1]))

    def some_documents(
        self, count: int, choose: Callable[[int], NDArray[np.int64]]
    ) -> list[tuple[int, int]]:
        """(start, end) of up to `count` documents; `choose(n)` names some of the n that there
        are, by number."""
        ends_before = np.cumsum([0, *(len(self._part(i)[1]) for i in range(len(self._bounds) - 1))])
        total = int(ends_before[-1])
        found = []
        for number in sorted(choose(total).tolist())[:count] if total else []:
            i = int(np.searchsorted(ends_before, number, side="right")) - 1
            ends, local = self._part(i)[1], number - int(ends_before[i])
            begin = int(ends[local - 1]) if local else 0
            found.append((self._bounds[i] + begin, self._bounds[i] + int(ends[local])))
        return found

    def ends(self) -> NDArray[np.int64]:
        """The position just after each document's last token, ascending, (documents,): 8 bytes
        each, in memory."""
        pieces = [
            self._part(i)[1].astype(np.int64) + start for i, start in enumerate(self._bounds[:-1])
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
