"""How many threads compute the next token: as many as make it fastest just now.

    pace = Pace(most=2)
    for _ in tokens:
        threads = pace.threads()
        ...
        pace.took(seconds)

Threads wait for one another two hundred times a token. Where other programs have a processor every
now and then, all wait for the one that was put aside, and fewer threads are faster. What a token's
numbers are does not depend on it. So now and then a token is computed with half or twice as many,
and the number is kept that was faster.
"""

from __future__ import annotations

import statistics
from collections import deque

FIRST, EVERY = 4, 48
"""Tokens before another number is tried, at first and from then on."""
TRIED = 3
"""Tokens of a trial."""
GAIN = 0.92
"""A trial has to take less than this share of the time."""


class Pace:
    """Chooses by the time that tokens took."""

    def __init__(self, most: int) -> None:
        """`most` threads are there, and are used at first."""
        self.most = self.current = most
        self._trial: int | None = None
        self._usual: deque[float] = deque(maxlen=EVERY)
        self._tried: list[float] = []
        self._left, self._down = FIRST, True

    def threads(self) -> int:
        """Of the next token."""
        return self.current if self._trial is None else self._trial

    def took(self, seconds: float) -> None:
        """What that token took."""
        if self._trial is None:
            self._usual.append(seconds)
            self._left -= 1
            if self._left <= 0 and (other := self._other()) != self.current:
                self._trial, self._tried = other, []
            return
        self._tried.append(seconds)
        if len(self._tried) < TRIED:
            return
        if statistics.median(self._tried) < GAIN * statistics.median(self._usual):
            self.current = self._trial
            self._usual.clear()
            self._usual.extend(self._tried)
        else:
            self._down = not self._down
        self._trial, self._left = None, EVERY

    def _other(self) -> int:
        """Half or twice as many, in turns, as far as there are."""
        fewer, more = max(1, self.current // 2), min(self.most, 2 * self.current)
        if fewer == self.current:
            return more
        return fewer if self._down or more == self.current else more
