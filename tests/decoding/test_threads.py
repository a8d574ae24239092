"""The number of threads follows what tokens take."""

import pytest

from mobilellm.decoding.threads import EVERY, FIRST, TRIED, Pace


def used(most: int, tokens: int, seconds: dict[int, float], pace: Pace | None = None) -> list[int]:
    """The threads of each token, where so many threads take so long."""
    pace, found = pace or Pace(most), []
    for _ in range(tokens):
        found.append(pace.threads())
        pace.took(seconds[found[-1]])
    return found


def test_all_threads_stay_where_they_are_fastest() -> None:
    found = used(2, 500, {1: 2.0, 2: 1.0})
    assert found[: FIRST + TRIED + 1] == [2] * FIRST + [1] * TRIED + [2]
    assert found.count(1) <= TRIED * (1 + 500 / EVERY)


def test_fewer_are_used_while_they_are_faster_and_all_when_they_are_again() -> None:
    pace = Pace(2)
    busy = used(2, 100, {1: 1.0, 2: 3.0}, pace)
    assert busy[FIRST:].count(2) <= TRIED * 2
    quiet = used(2, 2 * EVERY, {1: 2.0, 2: 1.0}, pace)
    assert quiet[-EVERY // 2 :].count(2) == EVERY // 2


@pytest.mark.parametrize(("best", "most"), [(1, 8), (2, 8), (4, 8), (8, 8), (6, 12), (1, 1)])
def test_it_finds_a_number_between(best: int, most: int) -> None:
    seconds = {n: 1.0 + abs(n - best) for n in range(1, most + 1)}
    found = used(most, 20 * EVERY, seconds)
    assert sum(n == best for n in found[-4 * EVERY :]) > 3 * EVERY
