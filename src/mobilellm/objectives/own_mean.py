"""Objectives whose mean is not over targets, and which say more of a step than its loss.

`train/step.py` divides an objective's sum by the targets that count, unless it is an `OwnMean`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class OwnMean(Protocol):
    """What such an objective has beside its call."""

    def counted(self, targets: Tensor, documents: Tensor | None) -> Tensor:
        """How many of its units (pairs, say) are in a batch, as a tensor on its device."""
        ...

    def figures(self) -> dict[str, Tensor]:
        """Sums over units, by the names of metrics, since this was last asked."""
        ...
