"""McNemar's test against scipy's binomial test."""

import random

import pytest

from mobilellm.errors import UserError
from mobilellm.tasks.paired import mcnemar


@pytest.mark.parametrize(("size", "drop"), [(10, 0.5), (300, 0.1), (9000, 0.2), (10, 0.0)])
def test_the_p_value_is_the_binomial_tests(size: int, drop: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(size)
    first = [draw.random() < 0.6 for _ in range(size)]
    second = [value if draw.random() > drop else draw.random() < 0.55 for value in first]
    found = mcnemar(first, second)
    total = found.first_only + found.second_only
    expected = stats.binomtest(found.first_only, total).pvalue if total else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.difference == pytest.approx((sum(first) - sum(second)) / size)


def test_other_items_are_refused() -> None:
    with pytest.raises(UserError, match="same ones"):
        mcnemar([True], [True, False])
