"""The rule by which documents are held out, as every task of a run applies it.

    rule = SplitRule(rule="documents", fraction=0.01, seed=0)
    held_out, bits = rule.held_out("wiki", 0, 4711)

A document's place is its source, the number of its file there, and its position in that file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mobilellm.data.order import derive_key


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which documents are held out.

    They are those whose draw is below `fraction`, but for one that is named here; and the tail of a
    source that is a single document.
    """

    rule: str
    """ "tail" when every source is a single document, else "documents"."""
    fraction: float
    seed: int
    tails: tuple[str, ...] | list[str] = ()
    """Sources that are a single document."""
    forced_out: list[Any] | None = None
    """(source, file, key) of a document that is held out although its draw is higher."""
    forced_in: list[Any] | None = None
    """(source, file, key) of a document that is trained on although its draw is lower."""

    def draw(self, source: str, file: int, key: int) -> tuple[float, int]:
        """A number in [0, 1) that the document's place decides, and the 64 bits it is made of."""
        bits = derive_key(self.seed, source, file, key)
        return bits / 2.0**64, bits

    def held_out(self, source: str, file: int, key: int) -> tuple[bool, int]:
        """Whether a document is held out, and 64 bits of its own."""
        draw, bits = self.draw(source, file, key)
        place = [source, file, key]
        if place == self.forced_out:
            return True, bits
        return (draw < self.fraction if place != self.forced_in else False), bits
