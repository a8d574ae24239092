"""Intervals and rank correlations of a few paired measurements, without scipy.

    difference = paired([2.31, 2.33, 2.30], [2.28, 2.31, 2.29])
    difference.mean, difference.low, difference.high        # 95 % interval by Student's t

A seed gives a run its first weights and its data together, and all cells of a lab have the same
seeds. So cells are compared seed by seed, and what a seed does to all of them cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the interval that holds the true one in 95 of 100 such experiments."""

    mean: float
    half: float | None
    """Half of the interval's width; None for a single measurement, which says nothing of it."""
    count: int

    @property
    def low(self) -> float:
        """Its lower end; minus infinity for a single measurement."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end; infinity for a single measurement."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def holds_zero(self) -> bool:
        """Whether no difference at all is inside: what is measured cannot be told from noise."""
        return self.low <= 0 <= self.high


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent measurements and its 95 % interval."""
    count = len(values)
    half = None
    if count > 1:
        half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean=statistics.fmean(values), half=half, count=count)


def paired(base: Sequence[float], other: Sequence[float]) -> Interval:
    """The mean of `other` - `base`, measured with the same seeds in the same order."""
    return interval([b - a for a, b in zip(base, other, strict=True)])


def smallest_difference(deviation: float, seeds: int) -> float | None:
    """The difference that its own interval would not reach zero from, for paired differences of
    this standard deviation; None for one seed."""
    return t_quantile(seeds - 1) * deviation / math.sqrt(seeds) if seeds > 1 else None


def residual_deviation(table: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation of what is left of measurements (cells, seeds) when each cell's and each
    seed's mean is taken away: the noise of one run among runs of the same seed.

    None for fewer than two cells or two seeds.
    """
    cells, seeds = len(table), len(table[0]) if table else 0
    if cells < 2 or seeds < 2:
        return None
    whole = statistics.fmean(value for row in table for value in row)
    rows = [statistics.fmean(row) for row in table]
    columns = [statistics.fmean(row[seed] for row in table) for seed in range(seeds)]
    left = sum(
        (value - rows[i] - columns[j] + whole) ** 2
        for i, row in enumerate(table)
        for j, value in enumerate(row)
    )
    return math.sqrt(left / ((cells - 1) * (seeds - 1)))


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: of the ranks, equal values sharing their mean rank. None where one of both is
    the same everywhere, or for fewer than three pairs."""
    if len(a) != len(b):
        raise ValueError("two lists of one length")
    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    middle = (len(a) + 1) / 2
    product = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)
    return product / math.sqrt(spread)


def best_place(places: Sequence[float], scores: Sequence[float]) -> float:
    """Where a parabola over log place is lowest within the places; else the best of them."""
    x = np.log(places)
    a, b, _ = np.polyfit(x, scores, 2)
    if a <= 0:
        return float(places[int(np.argmin(scores))])
    return float(np.exp(np.clip(-b / (2 * a), x.min(), x.max())))


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, lowest first."""
    return [
        sum(other < value for other in values) + (sum(o == value for o in values) + 1) / 2
        for value in values
    ]


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """What Student's t with so many degrees of freedom stays below, in size, with probability
    `level`."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """The probability that Student's t is between -t and t (Abramowitz and Stegun, 26.7.3 and
    26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    term = total = 1.0
    if freedom % 2 == 0:
        for k in range(2, freedom, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        return math.sin(angle) * total
    if freedom == 1:
        return 2 * angle / math.pi
    for k in range(3, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * cosine * total)
