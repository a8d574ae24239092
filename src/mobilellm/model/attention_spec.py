"""What one block's attention looks at: every position before it, or a window of the last ones.

    specs = config.attention_specs         # one a block
    specs[0].held(1000)                    # 512: positions that a window of 512 keeps of 1,000
    specs[0].within(512) == FULL           # a window that nothing lies outside of is none

The masks of training, evaluation and exporters, the cache, its bytes and the FLOPs all ask here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """The positions that a block's queries attend to."""

    window: int | None = None
    """How many positions a query sees, its own included, as transformers counts them; None is all
    up to its own."""

    def held(self, length: int) -> int:
        """Positions that the last of `length` tokens sees, and that a cache must hold for it."""
        return length if self.window is None else min(self.window, length)

    def within(self, length: int) -> AttentionSpec:
        """The same over at most `length` positions: full where the window has them all."""
        return FULL if self.held(length) == length else self

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each query sees each key, by their positions: (T,), (S,) -> bool (T, S)."""
        distance = queries.unsqueeze(1) - keys
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


FULL = AttentionSpec()
