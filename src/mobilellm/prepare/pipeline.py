"""Tokenizing as a step of a datatrove pipeline, so that it runs after any of datatrove's steps,
on any of its executors.

    from datatrove.executor import SlurmPipelineExecutor

    shards = TokenShards(Path("data/web"), Path("tokenizer.model"), held_out=0.001)
    steps = [reader, extractor, quality, shards]    # any of datatrove's, and this one at the end
    first = SlurmPipelineExecutor(pipeline=steps, tasks=1000, ...)
    SlurmPipelineExecutor(pipeline=[FinishShards(shards)], tasks=1, depends=first, ...).run()

Each task writes its own shards beside the result, complete or not at all; the last pipeline puts
them into one token folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.files import PARTIAL, disk_errors, read_json, write_json
from mobilellm.jobs.pool import Workspace
from mobilellm.prepare.assembly import describe, put_together
from mobilellm.prepare.prepare import check_delimiters
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import FinishedTask, TaskResult, TaskRun, safe_name
from mobilellm.prepare.tasks import Job, Part, Task
from mobilellm.readers.reader import Record
from mobilellm.tokenizer.encoder import choose, library_version
from mobilellm.tokenizer.tokenizer import Tokenizer

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise UserError(
        f"this needs datatrove ({error})", hint="pip install 'mobilellm[data]'"
    ) from None


class TokenShards(PipelineStep):
    """Tokenizes documents; their source is what `metadata["source"]` names, or "text"."""

    type, name = "TOKENIZER", "mobilellm shards"

    def __init__(
        self,
        out: Path,
        tokenizer: Path,
        *,
        held_out: float = 0.01,
        seed: int = 0,
        bos: bool = False,
        eos: bool = True,
        library: str = "auto",
    ) -> None:
        """`UserError` when the tokenizer cannot be read, or lacks the tokens asked for."""
        super().__init__()
        loaded = Tokenizer.load(tokenizer)
        check_delimiters(loaded, bos, eos)
        self.out, self.tokenizer, self.sha256 = out, tokenizer, loaded.sha256
        self.split = SplitRule(rule="documents", fraction=held_out, seed=seed)
        self.bos, self.eos = bos, eos
        self.library, self.reason = choose(loaded, library)

    def run(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write this task's shards, passing the documents on."""
        work = Workspace(self.out)
        key = f"rank-{rank:06d}"
        job = Job(
            tokenizer=str(self.tokenizer),
            tokenizer_sha256=self.sha256,
            library=self.library,
            library_version=library_version(self.library),
            split=self.split,
            bos=self.bos,
            eos=self.eos,
            text_field="text",
            sequence_length=2048,
            on_bad="stop",
        )
        with disk_errors(self.out):
            work.tasks.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{key}{PARTIAL}", dir=work.tasks))
            part = Part("", 0, 0, rank)
            runs: dict[str, TaskRun] = {}
            try:
                for number, document in enumerate(data):
                    source = safe_name(str(document.metadata.get("source") or "text"))
                    if source not in runs:
                        runs[source] = TaskRun(
                            Task(source, True, [part], 0), job, staging, lambda _: None
                        )
                    runs[source].take(
                        Record(f"document {document.id}", number, text=document.text), part
                    )
                    self.stat_update("total")
                    yield document
                write_json(
                    staging / "result.json",
                    {"parts": [asdict(runs[source].finish()) for source in sorted(runs)]},
                )
                shutil.rmtree(
                    work.tasks / key, ignore_errors=True
                )  # of an earlier attempt at the same task
                os.rename(staging, work.tasks / key)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise


class FinishShards(PipelineStep):
    """Puts what the tasks of a `TokenShards` wrote into its token folder; to be run as one task
    behind them."""

    type, name = "TOKENIZER", "mobilellm finish"

    def __init__(self, shards: TokenShards, expected_tasks: int | None = None) -> None:
        super().__init__()
        self.shards, self.expected_tasks = shards, expected_tasks

    def run(
        self, data: Iterable[Any] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Any]:
        """Make the folder. `UserError` when tasks are missing, or one of the splits is empty."""
        step, work = self.shards, Workspace(self.shards.out)
        folders = sorted(
            path for path in work.tasks.glob("rank-*") if (path / "result.json").is_file()
        )
        if not folders or (self.expected_tasks is not None and len(folders) != self.expected_tasks):
            raise UserError(
                f"{work.tasks}: {len(folders)} of {self.expected_tasks or 'no'} tasks are finished"
            )
        finished = [
            FinishedTask(folder, TaskResult.from_dict(part))
            for folder in folders
            for part in read_json(folder / "result.json")["parts"]
        ]
        results = [task.result for task in finished]
        names = sorted({name for result in results for name in result.counts})
        sources = [Source(name, []) for name in names]
        tokenizer = Tokenizer.load(step.tokenizer)
        manifest = describe(
            sources,
            results,
            tokenizer,
            step.split,
            bos=step.bos,
            eos=step.eos,
            library=step.library,
            reason=step.reason,
        )
        for split in ("train", "held_out"):
            if not any(s["split"] == split for result in results for s in result.shards):
                raise UserError(f"no document is in the {split} split", hint="set another held_out")
        put_together(step.out, finished, manifest, tokenizer)
        shutil.rmtree(work.path)
        return iter(data or ())
