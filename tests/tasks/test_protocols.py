"""The two protocols on the shipped items, with log-likelihoods made up."""

import random
from pathlib import Path

import pytest

from mobilellm.tasks.harness_tasks import load_tasks
from mobilellm.tasks.protocols import more_pairs, sample
from mobilellm.tasks.requests import Result


def results(count: int, seed: int) -> list[Result]:
    draw = random.Random(seed)
    return [Result(loglikelihood=-20 * draw.random(), greedy=False) for _ in range(count)]


def test_a_choice_in_the_context_is_not_divided_by(shared: Path) -> None:
    """WinoGrande's choices stand before what is scored, which is the same for both: per
    character changes nothing."""
    pytest.importorskip("lm_eval")
    from mobilellm.tasks.harness_run import items

    (task,) = load_tasks(["winogrande"], shared / "eval").values()
    for number, document in enumerate(items(task, 50)):
        given = results(2, number)
        plain = max((0, 1), key=lambda i: given[i].loglikelihood)
        for protocol in ("paper", "harness"):
            found = sample(task, document, given, protocol)
            assert (found.chosen, found.chosen_norm) == (plain, plain)


def test_the_papers_rules(shared: Path) -> None:
    pytest.importorskip("lm_eval")
    from mobilellm.tasks.harness_run import items

    tasks = load_tasks(["openbookqa", "hellaswag"], shared / "eval")
    for name, task in tasks.items():
        for number, document in enumerate(items(task, 20)):
            (more,) = more_pairs(task, [document], "paper")
            asked = [*document.pairs, *more]
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


def test_the_harness_scores_answers_that_are_known(shared: Path) -> None:
    """Its metrics of given answers are what they come to by hand, with the error of a mean."""
    pytest.importorskip("lm_eval")
    from mobilellm.tasks.harness_run import items, metrics

    (task,) = load_tasks(["arc_easy"], shared / "eval").values()
    documents = items(task, 30)
    answers = [
        [(result.loglikelihood, False) for result in results(len(document.pairs), number)]
        for number, document in enumerate(documents)
    ]
    right, right_norm = [], []
    for document, row in zip(documents, answers, strict=True):
        gold = document.document["choices"]["label"].index(document.document["answerKey"])
        values = [value for value, _ in row]
        lengths = [len(text) - 1 for _, text in document.pairs]
        norms = [value / length for value, length in zip(values, lengths, strict=True)]
        right.append(values.index(max(values)) == gold)
        right_norm.append(norms.index(max(norms)) == gold)
    found = metrics(task, answers)
    share = sum(right) / 30
    assert 0 < share < 1
    assert found["acc"] == pytest.approx(share)
    assert found["acc_norm"] == pytest.approx(sum(right_norm) / 30)
    assert found["acc_stderr"] == pytest.approx((share * (1 - share) / 29) ** 0.5)
    with pytest.raises(ValueError, match="answers to"):
        metrics(task, [*answers[:-1], answers[-1][:-1]])
