"""Intervals and rank correlations against scipy, and against known values where it is not."""

import math
import random
import statistics

import pytest

from mobilellm.intervals import (
    interval,
    paired,
    rank_correlation,
    residual_deviation,
    smallest_difference,
    t_quantile,
)

# Two-sided 95 % points of Student's t, from printed tables.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 120: 1.980}


@pytest.mark.parametrize(("freedom", "wanted"), TABLE.items())
def test_quantiles_are_the_printed_ones(freedom: int, wanted: float) -> None:
    assert t_quantile(freedom) == pytest.approx(wanted, abs=6e-4)


def test_quantiles_equal_scipys() -> None:
    t = pytest.importorskip("scipy.stats").t
    for freedom in [*range(1, 40), 100, 1001]:
        for level in (0.5, 0.9, 0.95, 0.999):
            wanted = t.ppf((1 + level) / 2, freedom)
            assert t_quantile(freedom, level) == pytest.approx(wanted, rel=1e-9)


def test_a_paired_interval_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for count in (2, 3, 5, 12):
        base = [draw.gauss(2.3, 0.05) for _ in range(count)]
        other = [value - 0.02 + draw.gauss(0, 0.01) for value in base]
        wanted = stats.ttest_rel(other, base).confidence_interval(0.95)
        found = paired(base, other)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
        assert found.holds_zero == (stats.ttest_rel(other, base).pvalue > 0.05)


def test_pairing_takes_away_what_a_seed_does_to_all() -> None:
    base, other = [2.0, 2.5, 3.0], [2.1, 2.6, 3.1]
    assert paired(base, other).half == pytest.approx(0, abs=1e-12)
    assert not paired(base, other).holds_zero
    assert interval([b - 2.5 for b in other]).holds_zero


def test_one_measurement_has_no_interval() -> None:
    found = paired([2.0], [2.5])
    assert (found.mean, found.half, found.holds_zero) == (0.5, None, True)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert smallest_difference(0.1, 1) is None


def test_the_smallest_difference_is_that_whose_interval_ends_at_zero() -> None:
    differences = [0.1, 0.3, 0.2]
    least = smallest_difference(statistics.stdev(differences), 3)
    assert least is not None
    assert interval(differences).half == pytest.approx(least)


def test_rank_correlation_equals_scipys() -> None:
    spearman = pytest.importorskip("scipy.stats").spearmanr
    draw = random.Random(1)
    for count in (3, 4, 9, 20):
        a = [draw.gauss(0, 1) for _ in range(count)]
        b = [round(value + draw.gauss(0, 1)) for value in a]
        wanted = spearman(a, b).statistic
        found = rank_correlation(a, b)
        assert (math.nan if found is None else found) == pytest.approx(wanted, nan_ok=True)


def test_rank_correlation_of_known_orders() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == 1
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == -1
    assert rank_correlation([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(0.9486833)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) is None
    assert rank_correlation([1, 2], [1, 2]) is None
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1, 2, 3], [1, 2])


def test_what_is_left_when_cells_and_seeds_are_taken_away() -> None:
    assert residual_deviation([[1, 2, 3], [2, 3, 4], [0, 1, 2]]) == pytest.approx(0)
    # Two cells: their differences' deviation over the square root of two.
    a, b = [1.0, 2.0, 4.0], [1.5, 2.0, 5.0]
    deviation = statistics.stdev(y - x for x, y in zip(a, b, strict=True))
    assert residual_deviation([a, b]) == pytest.approx(deviation / math.sqrt(2))
    assert residual_deviation([[1.0, 2.0]]) is None
    assert residual_deviation([[1.0], [2.0]]) is None
