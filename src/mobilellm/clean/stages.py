"""Cleaning on datatrove: quality filter, decontamination, exact and MinHash deduplication.

    report, cleaned = clean(sources, Path("work"), decontaminate=Path("evaluation-sets"), workers=8)
    prepare(cleaned, Path("data/clean"))

The stages are ordinary datatrove pipelines (`stages`), so they run on its Slurm and Ray executors
as they do here on the local one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from mobilellm.clean.passages import evaluation_files
from mobilellm.clean.steps import (
    EXAMPLES,
    HASH,
    MINHASH,
    Decontaminate,
    Dropped,
    Keep,
    QualityFilter,
    ReadKept,
    ReadSources,
    Signature,
    content_of,
)
from mobilellm.errors import UserError
from mobilellm.files import disk_errors, locked
from mobilellm.prepare.sources import Source, left_out
from mobilellm.prepare.tasks import plan

try:
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.dedup.minhash import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
except ImportError as error:
    raise UserError(
        f"cleaning needs datatrove ({error})", hint="pip install 'mobilellm[data]'"
    ) from None

CLEANING_VERSION = 1  # of the rules of the steps
STEPS = ("unreadable", "quality", "decontamination", "exact duplicate", "near duplicate")


@dataclass(frozen=True)
class CleaningStage:
    """One datatrove pipeline, and into how many tasks it is to be divided."""

    name: str
    pipeline: list[Any]
    tasks: int


def stages(
    sources: list[Source],
    folder: Path,
    *,
    decontaminate: Path | None = None,
    text_field: str = "text",
    separator: str | None = None,
    on_bad: str = "stop",
) -> list[CleaningStage]:
    """The pipelines, to be run one after the other, by any datatrove executor.

    Documents end up in folder/cleaned/SOURCE.
    """
    tasks = len(plan(sources))
    exact = ExactDedupConfig(content_getter=content_of, hash_config=HASH, only_dedup_in_index=False)
    first: list[Any] = [
        ReadSources(sources, folder, text_field, on_bad, separator),
        QualityFilter(Dropped(folder, "quality")),
    ]
    if decontaminate is not None:
        first.append(Decontaminate(decontaminate, Dropped(folder, "decontamination")))
    first += [Keep(folder / "kept-1"), ExactDedupSignature(str(folder / "exact/signatures"), exact)]
    second = [
        ReadKept(folder / "kept-1"),
        ExactDedupFilter(
            str(folder / "exact/duplicates"), exact, Dropped(folder, "exact duplicate")
        ),
        Keep(folder / "kept-2"),
        Signature(folder / "near/signatures"),
    ]
    buckets = MinhashDedupBuckets(
        str(folder / "near/signatures"),
        str(folder / "near/pairs"),
        config=MINHASH,
        only_dedup_in_index=False,
    )
    third = [
        ReadKept(folder / "kept-2"),
        MinhashDedupFilter(str(folder / "near/removed"), Dropped(folder, "near duplicate")),
        Keep(folder / "cleaned", by_source=True),
    ]
    return [
        CleaningStage("filter", first, tasks),
        CleaningStage(
            "exact",
            [
                ExactFindDedups(
                    str(folder / "exact/signatures"), str(folder / "exact/duplicates"), exact
                )
            ],
            1,
        ),
        CleaningStage("unique", second, tasks),
        CleaningStage("pairs", [buckets], MINHASH.num_buckets),
        CleaningStage(
            "clusters",
            [
                MinhashDedupCluster(
                    str(folder / "near/pairs"), str(folder / "near/removed"), config=MINHASH
                )
            ],
            1,
        ),
        CleaningStage("final", third, tasks),
    ]


def clean(
    sources: list[Source],
    folder: Path,
    *,
    decontaminate: Path | None = None,
    text_field: str = "text",
    separator: str | None = None,
    on_bad: str = "stop",
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[Source]]:
    """Run the stages here, with `workers` processes.

    Returns the report and the cleaned sources, which lie in `folder`. A run that was stopped goes
    on where it was. `UserError` for bad input, and when nothing is left.
    """
    from datatrove.executor import LocalPipelineExecutor

    passed_over = left_out(sources, say)
    sources = [replace(source, paths=source.files()) for source in sources]
    against = [
        (path, path.stat()) for path in (evaluation_files(decontaminate) if decontaminate else ())
    ]
    settings = [
        CLEANING_VERSION,
        [asdict(task) for task in plan(sources)],
        text_field,
        separator,
        on_bad,
        [[str(path), status.st_size, status.st_mtime_ns] for path, status in against],
    ]
    # Other settings have another folder, and so take nothing over.
    place = folder / hashlib.sha256(orjson.dumps(settings)).hexdigest()[:16]
    with disk_errors(folder):
        place.mkdir(parents=True, exist_ok=True)
    hint = "wait for it, or choose another name"
    with locked(folder / "lock", folder, "is cleaning there", hint=hint):
        for stage in stages(
            sources,
            place,
            decontaminate=decontaminate,
            text_field=text_field,
            separator=separator,
            on_bad=on_bad,
        ):
            say(f"cleaning: {stage.name}, {stage.tasks} tasks")
            executor = LocalPipelineExecutor(
                pipeline=stage.pipeline,
                tasks=stage.tasks,
                workers=min(workers, stage.tasks),
                skip_completed=True,
                logging_dir=str(place / "logs" / stage.name),
            )
            with _quiet(place / "console.log"):
                executor.run()
    report = summary(place)
    if passed_over:
        report["files_left_out"] = passed_over
    cleaned = [
        Source(source.name, sorted(kept.glob("*.jsonl")), source.weight, source.given)
        for source in sources
        if (kept := place / "cleaned" / source.name).is_dir()
    ]
    if not cleaned:
        raise UserError(
            f"{sources[0].paths[0]}: no document is left after cleaning",
            hint=f"the reasons are in {place}/dropped",
        )
    return report, cleaned


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Send what datatrove prints, here and in its processes, to a file: some pages for every
    task."""
    from datatrove.utils.logging import setup_default_logger

    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(path, "a") as log, contextlib.redirect_stderr(log):
            os.dup2(log.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        setup_default_logger()


def summary(folder: Path) -> dict[str, Any]:
    """Documents read and kept, and for each step how many it dropped, why, and ten examples.

    Checks that none is lost.
    """
    read = sum(orjson.loads(path.read_bytes()) for path in (folder / "read").glob("*.json"))
    kept = 0
    for path in (folder / "cleaned").rglob("*.jsonl"):
        with open(path, "rb") as file:
            kept += sum(1 for _ in file)
    dropped: dict[str, Any] = {}
    for step in STEPS:
        notes = [
            orjson.loads(path.read_bytes())
            for path in sorted((folder / "dropped" / step).glob("*.json"))
        ]
        reasons = sum((Counter(note["reasons"]) for note in notes), Counter[str]())
        dropped[step] = {
            "documents": sum(note["count"] for note in notes),
            "reasons": dict(sorted(reasons.items())) if any(reasons) else {},
            "examples": [example for note in notes for example in note["examples"]][:EXAMPLES],
        }
    lost = read - kept - sum(step["documents"] for step in dropped.values())
    assert not lost, f"{lost} of {read} documents were lost in cleaning"
    return {"documents_read": read, "documents_kept": kept, "dropped": dropped}
