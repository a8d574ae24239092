"""Several models on several tasks, with results on disk as they come.

    scores = run_tasks(subject, tasks, cache=Path("cache"), ...)
    write_samples(Path("scores/samples.jsonl"), samples)

The cache is named by the hash of the model's files, the precision, the task and the protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.files import write_file
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.harness_tasks import HarnessTask
from mobilellm.tasks.paired import Paired, mcnemar
from mobilellm.tasks.protocols import Sample
from mobilellm.tasks.requests import Encoder
from mobilellm.tasks.result_cache import Progress, ResultCache
from mobilellm.tasks.task_scores import average, score_task

OpenProgress = Callable[[str], contextlib.AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score."""

    name: str
    engine: Engine
    encoder: Encoder
    fingerprint: str
    """Hash of its files, and the precision it computes in: the first part of its cache's name."""
    parameters: int
    exact: tuple[Engine, str] | None = None
    """The same model in float32 with its fingerprint, where choices are to be held to it."""


def run_tasks(
    subject: Subject,
    tasks: dict[str, HarnessTask],
    *,
    cache: Path,
    protocol: str,
    limit: int | None,
    progress: OpenProgress,
) -> tuple[dict[str, dict[str, Any]], list[Sample]]:
    """Scores by task with their average, and every multiple-choice item."""
    scores, samples = {}, []
    for name, task in tasks.items():
        exact, also = subject.exact or (None, "")
        with contextlib.ExitStack() as stack:
            kept, exact_kept = (
                stack.enter_context(ResultCache(cache / folder / f"{name}.{protocol}.jsonl"))
                if folder
                else None
                for folder in (subject.fingerprint, also)
            )
            update = stack.enter_context(progress(f"{subject.name}: {name}"))
            found = score_task(
                task,
                subject.engine,
                subject.encoder,
                limit=limit,
                protocol=protocol,
                cache=kept,
                progress=update,
                exact=exact,
                exact_cache=exact_kept,
            )
        scores[name] = found.metrics
        samples += found.samples
    return scores | average(scores), samples


def write_samples(path: Path, samples: dict[str, list[Sample]]) -> None:
    """One JSON line an item of each model."""
    lines = (
        orjson.dumps({"model": model} | dataclasses.asdict(each))
        for model, found in samples.items()
        for each in found
    )
    write_file(path, b"".join(line + b"\n" for line in lines))


def matched(first: Sequence[Sample], second: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """The items that both models answered, in the first's order."""
    others = {(each.task, each.protocol, each.index): each for each in second}
    for each in first:
        if other := others.get((each.task, each.protocol, each.index)):
            yield each, other


def compare(first: Sequence[Sample], second: Sequence[Sample]) -> dict[str, dict[str, Paired]]:
    """McNemar's test for `acc` and `acc_norm`, by task and over "all"."""
    together = list(matched(first, second))
    if not together:
        raise UserError("the two models have no items in common")
    tasks = list(dict.fromkeys(each.task for each, _ in together))
    found: dict[str, dict[str, Paired]] = {}
    for name in [*tasks, "all"]:
        of = [(a, b) for a, b in together if name in ("all", a.task)]
        found[name] = {
            "acc": mcnemar([a.correct for a, _ in of], [b.correct for _, b in of]),
            "acc_norm": mcnemar([a.correct_norm for a, _ in of], [b.correct_norm for _, b in of]),
        }
    return found


def differing(
    first: Iterable[Sample], second: Iterable[Sample], most: int
) -> list[tuple[Sample, Sample]]:
    """Items that one model has right and the other wrong, at most `most`, those of the first
    model's gains in front."""
    pairs = [(a, b) for a, b in matched(list(first), list(second)) if a.correct != b.correct]
    return sorted(pairs, key=lambda pair: not pair[0].correct)[:most]


def explain(names: tuple[str, str], pair: tuple[Sample, Sample]) -> str:
    """One differing item as text: the question, each choice with both models' scores, who chose
    what."""
    a, b = pair
    lines = [
        f"{a.task} #{a.index}, protocol {a.protocol}",
        *(f"  {context}" for context in a.context),
    ]
    for i, text in enumerate(a.continuations):
        marks = [
            "right" if i in a.gold else "",
            *(name for name, each in zip(names, pair, strict=True) if each.chosen == i),
        ]
        tail = f"  <- {', '.join(filter(None, marks))}" if any(marks) else ""
        lines.append(f"  {a.scores[i]:9.3f} {b.scores[i]:9.3f} {text}{tail}")
    return "\n".join(lines)
