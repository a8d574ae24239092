"""The two protocols on the shipped items, with log-likelihoods made up."""

import random
from pathlib import Path

import pytest

from mobilellm.evaluate.harness_tasks import load_tasks
from mobilellm.evaluate.protocols import pairs, sample
from mobilellm.evaluate.requests import Result


def results(count: int, seed: int) -> list[Result]:
    draw = random.Random(seed)
    return [Result(loglikelihood=-20 * draw.random(), greedy=False) for _ in range(count)]


def test_a_choice_in_the_context_is_not_divided_by(shared: Path) -> None:
    """WinoGrande's choices stand before what is scored, which is the same for both: per character changes nothing."""
    pytest.importorskip("lm_eval")
    (task,) = load_tasks(["winogrande"], shared / "eval").values()
    for number, document in enumerate(task.items(50)):
        given = results(2, number)
        plain = max((0, 1), key=lambda i: given[i].loglikelihood)
        for protocol in ("paper", "harness"):
            found = sample(task, document, given, protocol)
            assert (found.chosen, found.chosen_norm) == (plain, plain)


def test_the_papers_rules(shared: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = load_tasks(["openbookqa", "hellaswag"], shared / "eval")
    for name, task in tasks.items():
        for number, document in enumerate(task.items(20)):
            asked = pairs(task, document, "paper")
            given = results(len(asked), number)
            found = sample(task, document, given, "paper")
            if name == "openbookqa":  # relative to the answer behind "Answer:" alone
                assert [context for context, _ in asked[4:]] == ["Answer:"] * 4
                scores = [given[i].loglikelihood - given[i + 4].loglikelihood for i in range(4)]
            else:
                assert len(asked) == 4
                scores = [
                    r.loglikelihood / len(text.removeprefix(" "))
                    for r, (_, text) in zip(given, asked, strict=True)
                ]
            assert found.chosen == max(range(4), key=scores.__getitem__)
