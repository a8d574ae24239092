"""Two models on the same items: is the one better, or is it noise?

    mcnemar([True, False, True], [True, True, False]).p_value

McNemar's exact test (Psychometrika 12, 1947) looks only at items where one model is right and
the other wrong: under the null hypothesis each falls to either side with probability one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mobilellm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The comparison of a first with a second model."""

    items: int
    first_only: int
    """Items only the first model has right."""
    second_only: int
    p_value: float
    """Two-sided, exact."""

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.first_only - self.second_only) / self.items

    @property
    def stderr(self) -> float:
        """Standard error of `difference` over paired items."""
        n, discordant = self.items, self.first_only + self.second_only
        return math.sqrt(max(0.0, discordant / n - self.difference**2) / n)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare correctness item by item. `UserError` when they are not of the same items."""
    if len(first) != len(second) or not first:
        raise UserError(
            f"{len(first)} items and {len(second)}: a paired comparison needs the same ones"
        )
    a = sum(x and not y for x, y in zip(first, second, strict=True))
    b = sum(y and not x for x, y in zip(first, second, strict=True))
    n, k = a + b, min(a, b)
    # 2 P(X <= k) for X of Binomial(n, 1/2), in exact integers; at most 1
    tail = sum(math.comb(n, i) for i in range(k + 1))
    p = min(1.0, float(2 * tail / 2**n)) if n < 1000 else min(1.0, math.exp(_log_tail(n, k)))
    return Paired(items=len(first), first_only=a, second_only=b, p_value=p)


def _log_tail(n: int, k: int) -> float:
    """log of 2 P(X <= k): the integers of a large n exceed a float."""
    return math.log(2) + math.log(sum(math.comb(n, i) for i in range(k + 1))) - n * math.log(2)
