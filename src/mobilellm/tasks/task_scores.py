"""Scores on tasks, for the command line and for the training loop.

    score_tasks(network, tokenizer, ["commonsense"], Path("data/eval"), limit=100)["average"]["acc"]

lm-eval (the extra `eval`) is imported when a function is called, not before.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mobilellm.errors import UserError
from mobilellm.model.network import Network
from mobilellm.tasks import protocols
from mobilellm.tasks.checked import recheck
from mobilellm.tasks.engine import Engine, NetworkBackend
from mobilellm.tasks.harness_tasks import HarnessTask, load_tasks
from mobilellm.tasks.protocols import Sample
from mobilellm.tasks.requests import Encoder, OwnEncoder, Result, encode
from mobilellm.tasks.result_cache import Progress, ResultCache, score_cached
from mobilellm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mobilellm.tasks.harness_model import EngineModel


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A task's metrics and the items that they were computed from."""

    metrics: dict[str, Any]
    samples: list[Sample]


def score_tasks(
    network: Network,
    tokenizer: Tokenizer,
    tasks: list[str],
    data: Path | None,
    limit: int | None = None,
    protocol: str = "harness",
) -> dict[str, dict[str, Any]]:
    """Score a network on tasks ("commonsense" is all eight of the published tables).

    Gives for each task `acc`, `acc_stderr`, with the harness's protocol also `acc_norm` and its
    error where the task has it, then `count`, `protocol`, `split`, `harness` (version of
    lm-eval); and "average" over the multiple-choice tasks. `data` is a folder of the shipped
    sets, `limit` the number of items from each task's beginning. The network's mode and all
    random generators are left as they were. `UserError` as `load_tasks` has it.
    """
    protocols.check_protocol(protocol)
    with undisturbed(network):
        engine, encoder = Engine(NetworkBackend(network)), OwnEncoder(tokenizer)
        found = {
            name: score_task(task, engine, encoder, limit=limit, protocol=protocol).metrics
            for name, task in load_tasks(tasks, data).items()
        }
    return found | average(found)


def score_task(
    task: HarnessTask,
    engine: Engine,
    encoder: Encoder,
    *,
    limit: int | None = None,
    protocol: str = "harness",
    cache: ResultCache | None = None,
    progress: Progress | None = None,
    exact: Engine | None = None,
    exact_cache: ResultCache | None = None,
) -> TaskScore:
    """Score one task. `cache` gives what is known and keeps what is new.

    With `exact`, the same model in float32, items whose choice could depend on the engine's
    precision are computed again by it (checked.py), and the metrics gain `checked`.
    `progress(done, total)` counts items. `UserError` for a limit below 1, a task that generates
    text, and a task without choices where the protocol or `exact` needs them.
    """
    from mobilellm.tasks.harness_model import EngineModel
    from mobilellm.tasks.harness_run import metrics as harness_metrics
    from mobilellm.tasks.harness_run import run_harness

    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} items: must be 1 or more")
    if task.task.OUTPUT_TYPE == "generate_until":
        raise UserError(
            f"task {task.name!r} generates text, which is not scored here",
            hint=f"mobilellm-lm-eval --model mobilellm --tasks {task.name}",
        )
    whole_texts = task.task.OUTPUT_TYPE == "loglikelihood_rolling"
    if protocol == "paper" and not task.is_choice and not whole_texts:
        raise UserError(
            f"task {task.name!r} has no choices, so the paper's protocol says nothing of it"
        )
    if exact and not task.is_choice:
        raise UserError(
            f"task {task.name!r} has no choices that could be checked",
            hint="leave out --recheck, or --precision",
        )
    model = EngineModel(engine, encoder, cache=cache, progress=progress)
    found = run_harness(task, model, limit)
    rows = found.results
    metrics: dict[str, Any] = dict(found.metrics)
    samples = []
    checked: dict[str, Any] = {}
    if task.is_choice:
        more = protocols.more_pairs(task, found.documents, protocol)
        rows = [row + add for row, add in zip(rows, answers(more, model), strict=True)]
        if exact:
            again = EngineModel(exact, encoder, cache=exact_cache)
            pairs = [[*each.pairs, *add] for each, add in zip(found.documents, more, strict=True)]
            rows, checked = recheck(
                task,
                found.documents,
                rows,
                protocol,
                lambda places: answers([pairs[place] for place in places], again),
            )
            asked = [
                row[: len(each.pairs)] for row, each in zip(rows, found.documents, strict=True)
            ]
            metrics = dict(
                harness_metrics(task, [[(r.loglikelihood, r.greedy) for r in row] for row in asked])
            )
        samples = [
            protocols.sample(task, *each, protocol)
            for each in zip(found.documents, rows, strict=True)
        ]
    if protocol == "paper" and task.is_choice:
        metrics = proportion([each.correct for each in samples])
    named = "harness" if whole_texts else protocol
    about = facts(task, len(found.documents), named, len(model.cut))
    if model.apart:
        about["encoded_apart"] = len(model.apart)  # items with a continuation that merges away
    if checked:
        about["checked"] = checked
    return TaskScore(metrics=metrics | about, samples=samples)


def answers(pairs: Sequence[Sequence[tuple[str, str]]], model: EngineModel) -> list[list[Result]]:
    """Results of further (context, continuation) pairs of each item, by the model's engine."""
    keys = [i for i, row in enumerate(pairs) for _ in row]
    requests = encode(
        [pair for row in pairs for pair in row], model.encoder, model.engine.backend.max_length
    )
    results = iter(score_cached(model.engine, requests, keys, model.cache, model.progress))
    return [[next(results) for _ in row] for row in pairs]


def facts(task: HarnessTask, count: int, protocol: str, cut: int) -> dict[str, Any]:
    """What a number must carry."""
    found: dict[str, Any] = {
        "count": count,
        "protocol": protocol,
        "split": task.split,
        "harness": task.harness,
    }
    if cut:
        found["truncated"] = cut  # items that lost their beginning to the model's context
    if task.altered:
        found["altered"] = task.altered
    return found


def proportion(correct: Sequence[bool]) -> dict[str, float]:
    """`acc` with the standard error of a mean, as the harness counts it (n - 1)."""
    n = len(correct)
    share = sum(correct) / n
    return {"acc": share} | (
        {"acc_stderr": math.sqrt(share * (1 - share) / (n - 1))} if n > 1 else {}
    )


def average(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean over the multiple-choice tasks, each weighing the same; `acc_norm` takes `acc`
    where a task has no other."""
    rows = [row for row in scores.values() if "acc" in row]
    if not rows:
        return {}
    found: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if any(metric in row for row in rows):
            used = [metric if metric in row else "acc" for row in rows]
            found[metric] = sum(row[name] for row, name in zip(rows, used, strict=True)) / len(rows)
            errors = [row.get(f"{name}_stderr") for row, name in zip(rows, used, strict=True)]
            if all(error is not None for error in errors):  # the tasks' items are independent
                found[f"{metric}_stderr"] = math.sqrt(
                    sum(error**2 for error in errors if error is not None)
                ) / len(rows)
    found |= {"count": sum(row["count"] for row in rows), "tasks": len(rows)}
    return {"average": found | {key: rows[0][key] for key in ("protocol", "harness")}}


@contextlib.contextmanager
def undisturbed(network: Network) -> Iterator[None]:
    """Evaluation mode inside; outside, the mode and the states of all random generators are as
    before."""
    training, python, numbers = network.training, random.getstate(), np.random.get_state()
    network.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        network.train(training)
        random.setstate(python)
        np.random.set_state(numbers)
