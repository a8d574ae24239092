"""Text to a token folder: planned as tasks, done by as many processes as one likes, put together
in the order of the plan.

    prepare([Source("book", [Path("book.txt")])], Path("data/book"), vocab_size=2048)

The result depends on the files and the settings alone: not on the number of workers, nor on how
often the run was stopped. Until it is complete everything lies in OUT.preparing; what is
finished there is taken over by the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import orjson

from mobilellm.data.manifest import SPLITS, Manifest
from mobilellm.errors import UserError
from mobilellm.files import sweep_partial
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask
from mobilellm.prepare.assembly import describe, put_together
from mobilellm.prepare.samples import write_layout
from mobilellm.prepare.sources import Source, left_out
from mobilellm.prepare.split import decide, training_texts
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import FinishedTask, TaskResult
from mobilellm.prepare.tasks import Job, Task, plan
from mobilellm.readers.reader import ReadSettings
from mobilellm.readers.table import reader_of
from mobilellm.streams.places import sha256_of
from mobilellm.tokenizer.encoder import FAST, REFERENCE, MismatchError, choose, library_version
from mobilellm.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

Progress = Callable[[float, float], None]
Say = Callable[[str], None]
PRELOAD = (FAST, REFERENCE, "mobilellm.prepare.task_run")  # what a worker needs for its first task
TRAINING_BYTES = 1 << 30  # of text that a tokenizer is trained on; of more, a share chosen by hash


def made_from(manifest: Manifest, sources: list[Source]) -> bool:
    """Whether prepared data was made from just these files, by their content."""
    recorded = [file["sha256"] for source in manifest["sources"] for file in source["files"]]
    return recorded == [sha256_of(path) for source in sources for path in source.files()]


def check_names(sources: list[Source]) -> None:
    """`UserError` unless there are sources, and their names, which become file names, are plain
    and differ."""
    names = [source.name for source in sources]
    if not names:
        raise UserError("no text given", hint="name files or folders")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"a source named {name!r}", hint='use letters, digits, "-" and "_"')
        if names.count(name) > 1:
            raise UserError(
                f"two sources named {name!r}", hint="put their files into one source, or rename one"
            )


def prepare(
    sources: list[Source],
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 4096,
    held_out: float = 0.01,
    seed: int = 0,
    bos: bool = False,
    eos: bool = True,
    eos_token: str | None = None,
    text_field: str = "text",
    separator: str | None = None,
    sequence_length: int = 2048,
    workers: int | None = None,
    on_bad: str = "stop",
    library: str = "auto",
    nodes: int | None = None,
    progress: Progress | None = None,
    say: Say = lambda _: None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the token folder `out`, or with `nodes` the original's layout for so many; returns
    the manifest.

    Without a `tokenizer`, one of `vocab_size` is trained on the training split. `eos_token` names
    the token that ends documents, where it is not the tokenizer's own. `separator` divides text
    files into documents (`mobilellm.readers.text`). `workers`
    processes are used, by default one a core where there is work for them. `on_bad` "skip"
    counts what cannot be read and goes on; "stop" raises. `library` is "auto", or "tokenizers"
    for the reference. `sequence_length` is of samples, read or written: they have as many ids or
    one more. `progress(done, total)` counts bytes of the files, `say` is told what a user should
    know. `extra` is added to the manifest.

    `UserError` for any fault in the text, naming file and line, when `out` exists, and when
    another process is at work on it. Tasks that were finished by then are kept for the next run.
    """
    check_names(sources)
    if on_bad not in ("stop", "skip"):
        raise UserError(f"on-bad {on_bad!r}: must be stop or skip")
    if nodes is not None and not 1 <= nodes <= 100_000:
        raise UserError(f"{nodes} nodes: must be from 1 to 100,000")
    if not 2 <= sequence_length <= 1 << 24:
        raise UserError(f"a sequence length of {sequence_length}: must be from 2 to {1 << 24}")
    if tokenizer is not None and eos_token is not None:
        tokenizer = tokenizer.ending_with(eos_token)
    passed_over = left_out(sources, say)
    # Looked for once: a folder that changes meanwhile is read as it was found.
    sources = [replace(source, paths=source.files()) for source in sources]
    if separator is not None and not any(
        (reader := reader_of(path)) and reader.name == "text"
        for source in sources
        for path in source.paths
    ):
        raise UserError("--separator is of text files, and there is none", hint="leave it out")
    with Workspace.open(out) as work:
        sweep_partial(out.parent, out.name)
        tasks = plan(sources)
        total = sum(task.weight for task in tasks)
        if min(_workers(workers, total), len(tasks)) > 1:
            work.start(min(_workers(workers, total), len(tasks)), PRELOAD)
        passes = 1 if tokenizer else 2
        done_before = 0.0

        def report(done: float) -> None:
            if progress:
                progress(done_before + done, passes * total)

        reading = ReadSettings(
            text_field=text_field,
            vocab_size=tokenizer.vocab_size if tokenizer else None,
            sample_lengths=(sequence_length, sequence_length + 1),
            separator=separator,
        )
        split = decide(sources, held_out, seed, reading, on_bad)
        if tokenizer is None:
            wanted = Trained(vocab_size, eos_token or END_OF_TEXT)
            tokenizer = _trained(work, tasks, sources, split, reading, on_bad, wanted, say, report)
            done_before = total
            report(0)
        check_delimiters(tokenizer, bos, eos)
        tokenizer.save(work.path / "tokenizer")
        # Workers load the vocabulary while this process tries the fast library on it.
        likely = FAST if library != REFERENCE and find_spec(FAST) else REFERENCE
        folder = str(work.path / "tokenizer")
        work.warm("mobilellm.prepare.task_run:load_encoder", folder, likely, tokenizer.sha256)
        chosen, reason = choose(tokenizer, library)

        def job(with_library: str) -> Job:
            assert tokenizer is not None
            return Job(
                tokenizer=folder,
                tokenizer_sha256=tokenizer.sha256,
                library=with_library,
                library_version=library_version(with_library),
                split=split,
                bos=bos,
                eos=eos,
                text_field=text_field,
                sequence_length=sequence_length,
                on_bad=on_bad,
                separator=separator,
            )

        def run(settings: Job) -> list[FinishedTask]:
            keyed = [KeyedTask(settings.key(task), asdict(task), task.weight) for task in tasks]
            results = work.run(
                "mobilellm.prepare.task_run:tokenize",
                asdict(settings),
                keyed,
                workers=_workers(workers, total),
                progress=report,
                preload=PRELOAD,
            )
            return [
                FinishedTask(work.tasks / one.key, TaskResult.from_dict(result))
                for one, result in zip(keyed, results, strict=True)
            ]

        try:
            finished = run(job(chosen))
        except KeyboardInterrupt:
            if any(work.tasks.iterdir()):
                say(
                    f"stopped: what is finished lies in {work.path}, and the same command goes on "
                    "from there"
                )
            raise
        except MismatchError as error:
            reason = f"{FAST} was given up: {error}"
            chosen = REFERENCE
            say(f"{reason}; everything is tokenized again by {REFERENCE}")
            finished = run(job(chosen))
        if reason and library == "auto":
            say(f"tokenized by {REFERENCE}: {reason}")
        results = [task.result for task in finished]
        for name in SPLITS:
            if not any(shard["split"] == name for result in results for shard in result.shards):
                part = "held out" if name == "held_out" else "to train on"
                raise UserError(
                    f"{sources[0].paths[0]}: no document is left {part}",
                    hint="give more text, or another --held-out",
                )
        manifest = describe(
            sources, results, tokenizer, split, bos=bos, eos=eos, library=chosen, reason=reason
        ) | (extra or {})
        if passed_over:
            manifest["files_left_out"] = passed_over
        if nodes is None:
            put_together(out, finished, manifest, tokenizer)
        else:
            write_layout(
                work,
                out,
                finished,
                manifest,
                tokenizer,
                nodes=nodes,
                seed=seed,
                sequence_length=sequence_length,
                workers=_workers(workers, total),
            )
    return manifest


def check_delimiters(tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
    """`UserError` when a BOS or EOS is asked for that the tokenizer does not have."""
    if bos and tokenizer.bos_id is None:
        raise UserError(
            "a BOS token is asked for, but the tokenizer has none", hint="leave out --bos"
        )
    if eos and tokenizer.eos_id is None:
        raise UserError(
            "an EOS token is asked for, but the tokenizer has none", hint="add --no-eos"
        )


def _workers(asked: int | None, total: float) -> int:
    """Processes to start: as many as asked for; else one a core, or none beside this one for a
    few megabytes."""
    if asked is not None:
        if not 1 <= asked <= 4096:
            raise UserError(f"{asked} workers: must be from 1 to 4096")
        return asked
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if total > 16 << 20 else 1


@dataclass(frozen=True)
class Trained:
    """A tokenizer that is to be trained."""

    vocab_size: int
    eos: str


def _trained(
    work: Workspace,
    tasks: list[Task],
    sources: list[Source],
    split: SplitRule,
    reading: ReadSettings,
    on_bad: str,
    wanted: Trained,
    say: Say,
    report: Callable[[float], None],
) -> Tokenizer:
    """A tokenizer trained on the training texts, or the one that an earlier run trained on the
    same. `report` is told how far the texts are read, in the weight of tasks."""
    content = [[asdict(task) for task in tasks], asdict(split), asdict(reading), on_bad]
    content = [*content, asdict(wanted)]
    folder = work.path / f"trained-{hashlib.sha256(orjson.dumps(content)).hexdigest()[:32]}"
    if (folder / "tokenizer.json").is_file():
        trained = Tokenizer.load(folder)
        trained.name = "byte-level BPE"
        return trained
    size = sum(task.weight for task in tasks)
    share = min(1.0, TRAINING_BYTES / max(1, size))
    if share < 1:
        say(
            f"the tokenizer is trained on {share:.2%} of the documents, about "
            f"{TRAINING_BYTES >> 20} MiB"
        )
    read = 0.0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in training_texts(sources, split, reading, on_bad, share):
            yield text
            read = min(size, read + len(text) / share)
            report(read)

    trained = train_bpe(texts(), wanted.vocab_size, eos=wanted.eos)
    trained.save(folder)
    return trained
