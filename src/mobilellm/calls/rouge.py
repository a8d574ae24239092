"""Rouge-1 and Rouge-L: how much of a reference's words, and of their order, a text has.

    rouge_1("the cat sat", "the cat sat down"), rouge_l("the cat sat", "sat the cat")

F-measures on lower-case runs of letters and digits, without stemming, as the package rouge-score
computes them (Lin, 2004).
"""

from __future__ import annotations

import re
from collections import Counter

WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """The words that are compared."""
    return WORD.findall(text.lower())


def rouge_1(text: str, reference: str) -> float:
    """F-measure of single words, from 0 to 1."""
    said, wanted = words(text), words(reference)
    return _f(sum((Counter(said) & Counter(wanted)).values()), len(said), len(wanted))


def rouge_l(text: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, from 0 to 1."""
    said, wanted = words(text), words(reference)
    row = [0] * (len(wanted) + 1)
    for one in said:
        before = 0
        for i, other in enumerate(wanted, 1):
            before, row[i] = row[i], before + 1 if one == other else max(row[i], row[i - 1])
    return _f(row[-1], len(said), len(wanted))


def _f(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else 0.0
