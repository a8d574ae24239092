"""Differences of cells that do not have the same seeds."""

import pytest

from mobilellm.intervals import paired
from mobilellm.lab.results import difference


def test_only_seeds_that_both_have_are_compared() -> None:
    base, other = {0: 2.0, 1: 2.5, 2: 9.0}, {1: 2.4, 2: 8.7, 3: 1.0}
    found = difference(base, other)
    wanted = paired([2.5, 9.0], [2.4, 8.7])
    assert found is not None
    assert (found["mean"], found["low"], found["seeds"]) == (wanted.mean, wanted.low, 2)
    assert found["mean"] == pytest.approx(-0.2)
    assert difference({0: 1.0}, {1: 1.0}) is None
    alone = difference({0: 1.0}, {0: 1.5})
    assert alone is not None
    assert (alone["low"], alone["in_noise"]) == (None, True)
