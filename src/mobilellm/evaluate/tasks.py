"""Scores on tasks, for the command line and for the training loop.

    score_tasks(network, tokenizer, ["commonsense"], Path("data/eval"), limit=100)["average"]["acc"]

lm-eval (the extra `eval`) is imported when a function is called, not before.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilellm.errors import UserError
from mobilellm.evaluate import protocols
from mobilellm.evaluate.engine import Engine, NetworkBackend
from mobilellm.evaluate.harness_tasks import Document, HarnessTask, load_tasks
from mobilellm.evaluate.protocols import Sample
from mobilellm.evaluate.requests import Encoder, OwnEncoder, Request, Result, encode
from mobilellm.evaluate.result_cache import ResultCache
from mobilellm.evaluate.rolling import rolling_requests
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A task's metrics and the items behind them."""

    metrics: dict[str, Any]
    samples: list[Sample]


def score_tasks(
    network: Network, tokenizer: Tokenizer, tasks: list[str], data: Path | None, limit: int | None = None,
    protocol: str = "harness",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Score a network on tasks ("commonsense" is all eight of the published tables).

    Gives for each task `acc`, `acc_stderr`, with the harness's protocol also `acc_norm` and its error where the task has it,
    then `count`, `protocol`, `split`, `harness` (version of lm-eval); and "average" over the multiple-choice tasks.
    `data` is a folder of the shipped sets, `limit` the number of items from each task's beginning. The network's mode and all
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
    task: HarnessTask, engine: Engine, encoder: Encoder, *, limit: int | None = None, protocol: str = "harness",
    cache: ResultCache | None = None, progress: Progress | None = None,
) -> TaskScore:  # fmt: skip
    """Score one task. `progress(done, total)` counts items; `cache` gives what is known and keeps what is new."""
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} items: must be 1 or more")
    documents = list(task.items(limit))
    if task.task.OUTPUT_TYPE == "generate_until":
        raise UserError(
            f"task {task.name!r} generates text, which the multiple-choice engine does not do",
            hint=f"mobilellm-lm-eval --model mobilellm --tasks {task.name}",
        )
    if task.task.OUTPUT_TYPE == "loglikelihood_rolling":
        return score_texts(task, documents, engine, encoder, cache, progress)
    if protocol == "paper" and not task.is_choice:
        raise UserError(
            f"task {task.name!r} has no choices, so the paper's protocol says nothing of it"
        )
    wanted = [protocols.pairs(task, document, protocol) for document in documents]
    owners = [i for i, pairs in enumerate(wanted) for _ in pairs]
    requests = encode(
        [pair for pairs in wanted for pair in pairs], encoder, engine.backend.max_length
    )
    # Answers behind "Answer:" begin otherwise than the choices do: computed with them, nothing would be shared.
    keys = [
        (i, n >= len(documents[i].pairs))
        for i, pairs in enumerate(wanted)
        for n in range(len(pairs))
    ]
    results = compute(engine, requests, keys, cache, progress)
    rows: list[list[Result]] = [[] for _ in documents]
    for owner, result in zip(owners, results, strict=True):
        rows[owner].append(result)
    samples = []
    if task.is_choice:
        samples = [
            protocols.sample(task, *each, protocol) for each in zip(documents, rows, strict=True)
        ]
    if protocol == "harness":
        given = [[(result.loglikelihood, result.greedy) for result in row] for row in rows]
        metrics: dict[str, Any] = dict(protocols.metrics(task, documents, given))
    else:
        metrics = proportion([each.correct for each in samples])
    cut = len({owner for owner, request in zip(owners, requests, strict=True) if request.cut})
    return TaskScore(metrics=metrics | facts(task, len(documents), protocol, cut), samples=samples)


def score_texts(
    task: HarnessTask, documents: Sequence[Document], engine: Engine, encoder: Encoder, cache: ResultCache | None,
    progress: Progress | None,
) -> TaskScore:  # fmt: skip
    """A task of whole texts, such as wikitext: the log-likelihood of each, in windows of the model's context."""
    texts = [task.task.doc_to_target(document.document) for document in documents]
    requests, owners = [], []
    for i, windows in enumerate(rolling_requests(texts, encoder, engine.backend.max_length)):
        requests += windows
        owners += [i] * len(windows)
    results = compute(engine, requests, list(range(len(requests))), cache, progress)
    sums = [0.0] * len(documents)
    for owner, result in zip(owners, results, strict=True):
        sums[owner] += result.loglikelihood
    metrics = protocols.metrics(task, documents, [[value] for value in sums])
    return TaskScore(metrics=metrics | facts(task, len(documents), "harness", 0), samples=[])


def compute(
    engine: Engine,
    requests: Sequence[Request],
    owners: Sequence[Hashable],
    cache: ResultCache | None,
    progress: Progress | None,
) -> list[Result]:
    """Results of all requests, those of the cache taken from there."""
    known = {request: hit for request in requests if cache and (hit := cache.get(request))}
    rest = [
        (request, owner)
        for request, owner in zip(requests, owners, strict=True)
        if request not in known
    ]
    total = len(set(owners))
    left = len({owner for _, owner in rest})

    def update(done: int, of: int) -> None:
        if progress:
            progress(total - left + round(left * done / of), total)

    fresh = engine.score(
        [r for r, _ in rest],
        [o for _, o in rest],
        store=cache.add if cache else None,
        progress=update,
    )
    known.update(zip((r for r, _ in rest), fresh, strict=True))
    return [known[request] for request in requests]


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
    """The mean over the multiple-choice tasks, each weighing the same; `acc_norm` takes `acc` where a task has no other."""
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
    """Evaluation mode inside; outside, the mode and the states of all random generators are as before."""
    training, python, numbers = network.training, random.getstate(), np.random.get_state()
    network.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        network.train(training)
        random.setstate(python)
        np.random.set_state(numbers)
