"""Choices computed in a fast precision and held to those of float32.

    rows, checked = recheck(task, documents, rows, protocol, exact)
    checked["again"], checked["largest_error"]        # items computed again, nats

bf16 halves the time of a product and moves the log-likelihood of a long choice by tenths of a
nat. That changes what is chosen only where two choices stand close. So some items, spread over the
task, are computed in float32 too, which tells how far bf16 moves the distance between two choices;
then all items whose best two stand closer than `FACTOR` times the largest such move, until none is
left. Each item computed again adds to what is known. It is a check by measurement, not a proof: an
item would have to be moved more than twice as far as any of those compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mobilellm.tasks.harness_tasks import Document, HarnessTask
from mobilellm.tasks.protocols import rankings
from mobilellm.tasks.requests import Result

SAMPLE = 32
"""Items compared in any case, at even distances."""
FACTOR = 2.0

Rows = list[list[Result]]


def recheck(
    task: HarnessTask,
    documents: Sequence[Document],
    rows: Rows,
    protocol: str,
    exact: Callable[[list[int]], Rows],
) -> tuple[Rows, dict[str, float]]:
    """Results of each document with those of float32 where the choice might depend on the
    precision; and how many those are (`again`), with the largest move seen (`largest_error`).

    `exact` gives the results of the documents at these places. What a protocol compares, and the
    harness's likelihood per character, are judged each by its own moves.
    """
    count = len(documents)
    found = list(rows)

    def values(place: int) -> list[list[float]]:
        return rankings(task, documents[place], found[place], protocol)

    fast = [values(place) for place in range(count)]
    gaps = [[gap(ranking) for ranking in each] for each in fast]
    moved = [0.0] * len(gaps[0])
    sample = min(SAMPLE, count)
    close = sorted({i * count // sample for i in range(sample)})
    again: set[int] = set()
    while close:
        for place, row in zip(close, exact(close), strict=True):
            found[place] = row
            moved = list(map(max, moved, map(move, fast[place], values(place))))
        again.update(close)
        close = [
            place
            for place in range(count)
            if place not in again
            and any(a <= FACTOR * most for a, most in zip(gaps[place], moved, strict=True))
        ]
    return found, {"again": len(again), "largest_error": moved[0]}


def gap(values: Sequence[float]) -> float:
    """How far the best value lies above the next."""
    best, following = sorted((*values, -math.inf), reverse=True)[:2]
    return best - following


def move(before: Sequence[float], after: Sequence[float]) -> float:
    """The largest change of a choice's distance from the one that was best."""
    best = max(range(len(before)), key=before.__getitem__)
    return max(
        abs((before[best] - a) - (after[best] - b)) for a, b in zip(before, after, strict=True)
    )
