"""Hostile, broken and torn inputs of every format: one clean line, bounded memory and time.

What holds for each case is in `tests/hostile/child.py`: exit status 0 or 2, one line of printable
text, at most 512 MiB beside 1.5 times the input, 20 seconds, and nothing under a final name.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.hostile.base import make_base
from tests.hostile.formats import FORMATS
from tests.hostile.trying import table, try_cases

FAST = 10
"""Cases of each format in the fast tests."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("hostile") / "base")


def broken(results: list[dict[str, Any]]) -> str:
    """The cases that broke a promise, a line each."""
    found = [one for one in results if one["problems"]]
    return "\n".join(json.dumps(one)[:2500] for one in found)


def test_a_few_cases_of_every_format(base: Path) -> None:
    results = list(try_cases(base, ((name, seed) for name in FORMATS for seed in range(FAST))))
    assert not broken(results), broken(results)
    assert len(results) == FAST * len(FORMATS)


@pytest.mark.long
@pytest.mark.timeout(3000)  # of the clock, on a machine that is shared
def test_thousands_of_cases(base: Path) -> None:
    cases = [(name, seed) for name, (_, count) in FORMATS.items() for seed in range(FAST, count)]
    with ThreadPoolExecutor() as pool:  # each waits for a process
        halves = pool.map(lambda part: list(try_cases(base, part)), (cases[::2], cases[1::2]))
        results = list(itertools.chain(*halves))
    print(table(results))
    assert not broken(results), broken(results)
    assert len(results) + FAST * len(FORMATS) > 3000
    # Some of each kind are read all the same: cases that are all refused would try too little.
    assert sum(one["status"] == 0 for one in results) > 500


def test_the_last_net_never_sees_a_whole_input(base: Path) -> None:
    """It is for what is damaged; of a whole input it would hide a bug."""
    from tests.hostile.trying import try_whole

    for answer in try_whole(base):
        assert answer["status"] == 0, answer
        assert not answer["net"], answer
        assert not answer["problems"], answer
