"""Choices of a fast precision, held to those of float32."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from mobilellm.tasks.checked import SAMPLE, recheck
from mobilellm.tasks.harness_tasks import Document
from mobilellm.tasks.protocols import rankings
from mobilellm.tasks.requests import Result

ITEMS = 1500
# Of three choices the last is long, so that likelihood per character takes others.
TASK: Any = SimpleNamespace(name="openbookqa", choices=lambda _: ["one", "other", "third or so"])
PAIR = ("context", " end")


def rows(draw: random.Random, count: int) -> list[list[Result]]:
    return [[Result(-20 + 3 * draw.random(), False) for _ in range(count)] for _ in range(ITEMS)]


def moved(draw: random.Random, exact: list[list[Result]]) -> list[list[Result]]:
    return [
        [Result(each.loglikelihood + draw.uniform(-0.05, 0.05), False) for each in row]
        for row in exact
    ]


def chosen(documents: list[Document], found: list[list[Result]], protocol: str) -> list[list[int]]:
    ranked = [rankings(TASK, *each, protocol) for each in zip(documents, found, strict=True)]
    return [[values.index(max(values)) for values in each] for each in ranked]


@pytest.mark.parametrize("protocol", ["harness", "paper"])
def test_every_choice_is_that_of_the_exact_results(protocol: str) -> None:
    draw = random.Random(5)
    exact = rows(draw, 3 if protocol == "harness" else 6)  # the answers alone, too
    documents = [Document(i, {}, (PAIR,) * 3) for i in range(ITEMS)]
    fast, asked = moved(draw, exact), list[int]()

    def again(places: list[int]) -> list[list[Result]]:
        asked.extend(places)
        return [exact[place] for place in places]

    found, checked = recheck(TASK, documents, fast, protocol, again)
    wanted = chosen(documents, exact, protocol)
    assert chosen(documents, fast, protocol) != wanted
    assert chosen(documents, found, protocol) == wanted
    assert SAMPLE < checked["again"] == len(asked) == len(set(asked)) < ITEMS / 3
    assert 0.05 < checked["largest_error"] < 0.21
    assert [found[place] for place in asked] == [exact[place] for place in asked]


def test_equal_results_are_compared_on_a_sample_alone() -> None:
    documents = [Document(i, {}, (PAIR,) * 3) for i in range(ITEMS)]
    exact = rows(random.Random(6), 3)
    found, checked = recheck(
        TASK, documents, exact, "harness", lambda places: [exact[place] for place in places]
    )
    assert found == exact
    assert checked == {"again": SAMPLE, "largest_error": 0.0}
