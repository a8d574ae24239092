"""One door to lm-eval: a task of the harness, evaluated by the harness's own `evaluate`.

    found = run_harness(task, model, limit=100)      # model: any `lm_eval.api.model.LM`
    found.metrics["acc_norm"], found.results[0]

Prompts, requests, filters, metrics and standard errors are the harness's. What it logs of each
item, its requests and their answers, is handed on, so that other protocols can score the same
answers. Imported only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mobilellm.errors import UserError
from mobilellm.tasks.harness_tasks import Document, HarnessTask, quiet
from mobilellm.tasks.requests import Result

try:
    import lm_eval
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise UserError(f"tasks need lm-eval ({error})", hint="pip install 'mobilellm[eval]'") from None

BOOTSTRAP = 1000  # draws for the standard error of a metric that is no mean
FEWSHOT_SEED = 1234  # the harness's command line has it, too


@dataclass(frozen=True)
class Evaluated:
    """What the harness says of a task, and what it asked."""

    metrics: dict[str, float]
    """By name, with `NAME_stderr` where there is a standard error."""
    documents: list[Document]
    results: list[list[Result]]
    """Of each document's requests; whole texts have no `greedy`."""


def run_harness(task: HarnessTask, model: LM, limit: int | None = None) -> Evaluated:
    """Evaluate the first `limit` items of a task, or all. Raises what the model raises."""
    with quiet():
        task.task.set_fewshot_seed(FEWSHOT_SEED)
        found = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": {task.name: task.task}},
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
        )
    logged = found["samples"][task.name]
    # Each filter of answers logs all items again; the first one decides.
    first = logged[0]["filter"]
    logged = [each for each in logged if each["filter"] == first]
    return Evaluated(
        metrics_of(found["results"][task.name], first),
        [
            Document(
                each["doc_id"], each["doc"], tuple(tuple(args[:2]) for args in each["arguments"])
            )
            for each in logged
        ],
        [[result_of(answer) for answer in each["filtered_resps"]] for each in logged],
    )


def metrics_of(row: dict[str, Any], chosen: str) -> dict[str, float]:
    """The numbers of a row of results, whose keys are "metric,filter"."""
    found: dict[str, float] = {}
    for key, value in row.items():
        name, comma, given = key.partition(",")
        if comma and given == chosen and not isinstance(value, str):  # "N/A" has no number
            found[name] = float(value)
    return found


def result_of(answer: Any) -> Result:
    """A request's answer: (nats, greedy), or the nats of a whole text."""
    if isinstance(answer, (tuple, list)):
        return Result(float(answer[0]), bool(answer[1]))
    return Result(float(answer), False)


class Replay(LM):  # type: ignore[misc] # lm-eval is untyped
    """A model whose answers are known: those given, in the order of the requests, or nothing.

    With answers the harness scores results that another program computed; without, it is asked
    for its requests alone.
    """

    def __init__(self, answers: Sequence[tuple[float, bool]] | None = None) -> None:
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """The answers. `ValueError` when there are more or fewer than requests."""
        if self.answers is None:
            return [(-1.0, False)] * len(requests)
        if len(self.answers) != len(requests):
            raise ValueError(f"{len(self.answers)} answers to {len(requests)} requests")
        return list(self.answers)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """The first part of each answer."""
        return [nats for nats, _ in self.loglikelihood(requests)]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Nothing."""
        return [""] * len(requests)


def items(task: HarnessTask, limit: int | None = None) -> list[Document]:
    """The first `limit` items of a task, or all, with the harness's requests and no answers."""
    return run_harness(task, Replay(), limit).documents


def metrics(task: HarnessTask, answers: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, float]:
    """The harness's metrics of answers to the first items of a task, a sequence for each item."""
    flat = [answer for row in answers for answer in row]
    return run_harness(task, Replay(flat), len(answers)).metrics
