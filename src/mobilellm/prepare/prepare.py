"""Text to a token folder: planned as tasks, done by as many processes as one likes, put together in the order of the plan.

    prepare([Source("book", [Path("book.txt")])], Path("data/book"), vocab_size=2048)

The result depends on the files and the settings alone: not on the number of workers, nor on how often the run was stopped.
Until it is complete everything lies in OUT.preparing; what is finished there is taken over by the next run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from mobilellm.data.manifest import FORMAT, SPLITS, VERSION, Manifest, fingerprint
from mobilellm.data.shard_file import (
    ENDS,
    MASK,
    ends_file,
    map_shard,
    mask_bytes,
    mask_file,
    token_dtype,
)
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.files import new_folder, sha256_file, sweep_partial, write_json
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask
from mobilellm.prepare.documents import ReadSettings, Source
from mobilellm.prepare.sources import parse_sources as parse_sources
from mobilellm.prepare.split import decide, training_texts
from mobilellm.prepare.tasks import MAX_LISTED, Job, SplitRule, Task, plan, text_size
from mobilellm.tokenizer.encoder import FAST, REFERENCE, MismatchError, choose, library_version
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

Progress = Callable[[float, float], None]
Say = Callable[[str], None]
PRELOAD = (FAST, REFERENCE, "mobilellm.prepare.tasks")  # what a worker needs for its first task
TRAINING_BYTES = 1 << 30  # of text that a tokenizer is trained on; of more, a share chosen by hash


def made_from(manifest: Manifest, sources: list[Source]) -> bool:
    """Whether prepared data was made from just these files, by their content."""
    recorded = [file["sha256"] for source in manifest["sources"] for file in source["files"]]
    return recorded == [sha256_file(path) for source in sources for path in source.files()]


def check_names(sources: list[Source]) -> None:
    """`UserError` unless there are sources, and their names, which become file names, are plain and differ."""
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
    sources: list[Source], out: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int = 4096, held_out: float = 0.01,
    seed: int = 0, bos: bool = False, eos: bool = True, text_field: str = "text", sequence_length: int = 2048,
    workers: int | None = None, on_bad: str = "stop", library: str = "auto", nodes: int | None = None,
    progress: Progress | None = None, say: Say = lambda _: None, extra: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the token folder `out`, or with `nodes` the original's layout for so many; returns the manifest.

    Without a `tokenizer`, one of `vocab_size` is trained on the training split. `workers` processes are used, by default one
    a core where there is work for them. `on_bad` "skip" counts what cannot be read and goes on; "stop" raises. `library` is
    "auto", or "tokenizers" for the reference. `sequence_length` is of samples, read or written: they have as many ids or one
    more. `progress(done, total)` counts bytes of the files, `say` is told what a user should know.
    `extra` is added to the manifest.

    `UserError` for any fault in the text, naming file and line, when `out` exists, and when another process is at work on it.
    Tasks that were finished by then are kept for the next run.
    """
    check_names(sources)
    if on_bad not in ("stop", "skip"):
        raise UserError(f"on-bad {on_bad!r}: must be stop or skip")
    if nodes is not None and not 1 <= nodes <= 100_000:
        raise UserError(f"{nodes} nodes: must be from 1 to 100,000")
    if not 2 <= sequence_length <= 1 << 24:
        raise UserError(f"a sequence length of {sequence_length}: must be from 2 to {1 << 24}")
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
            text_field=text_field, vocab_size=tokenizer.vocab_size if tokenizer else None,
            sample_lengths=(sequence_length, sequence_length + 1),
        )  # fmt: skip
        split = decide(sources, held_out, seed, reading, on_bad)
        if tokenizer is None:
            tokenizer = _trained(work, tasks, sources, split, reading, on_bad, vocab_size, say)
            done_before = total
            report(0)
        check_delimiters(tokenizer, bos, eos)
        tokenizer.save(work.path / "tokenizer")
        chosen, reason = choose(tokenizer, library)

        def job(with_library: str) -> Job:
            assert tokenizer is not None
            return Job(
                tokenizer=str(work.path / "tokenizer"), tokenizer_sha256=tokenizer.sha256, library=with_library,
                library_version=library_version(with_library), split=split, bos=bos, eos=eos, text_field=text_field,
                sequence_length=sequence_length, on_bad=on_bad,
            )  # fmt: skip

        def run(settings: Job) -> tuple[list[str], list[dict[str, Any]]]:
            keyed = [KeyedTask(settings.key(task), asdict(task), task.weight) for task in tasks]
            return [one.key for one in keyed], work.run(
                "mobilellm.prepare.tasks:tokenize",
                asdict(settings),
                keyed,
                workers=_workers(workers, total),
                progress=report,
                preload=PRELOAD,
            )

        try:
            keys, results = run(job(chosen))
        except KeyboardInterrupt:
            if any(work.tasks.iterdir()):
                say(
                    f"stopped: what is finished lies in {work.path}, and the same command goes on from there"
                )
            raise
        except MismatchError as error:
            reason = f"{FAST} was given up: {error}"
            chosen = REFERENCE
            say(f"{reason}; everything is tokenized again by {REFERENCE}")
            keys, results = run(job(chosen))
        if reason and library == "auto":
            say(f"tokenized by {REFERENCE}: {reason}")
        manifest = describe(
            sources, results, tokenizer, split, bos=bos, eos=eos, library=chosen, reason=reason
        ) | (extra or {})
        if nodes is not None:
            from mobilellm.prepare.samples import write_layout

            write_layout(
                work,
                out,
                manifest,
                keys,
                results,
                tokenizer,
                nodes,
                sequence_length,
                seed,
                _workers(workers, total),
            )
            return manifest
        put_together(work, out, keys, results, manifest, tokenizer)
    return manifest


def describe(
    sources: list[Source], results: list[dict[str, Any]], tokenizer: Tokenizer, split: SplitRule, *, bos: bool, eos: bool,
    library: str, reason: str,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of tokenized tasks, but for the shards."""
    counts = _counts(sources, results)
    return {
        "format": FORMAT, "version": VERSION,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "dtype": token_dtype(tokenizer.vocab_size).str, "bos": bos, "eos": eos,
        "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id,
        "held_out": {"rule": split.rule, "fraction": split.fraction, "tails": list(split.tails)}, "seed": split.seed,
        "encoder": {
            "library": library_version(library), "documents_verified": sum(result["verified"] for result in results),
            "not_faster_because": reason or None,
        },
        "sources": counts,
        "skipped": {
            "empty": sum(source["empty"] for source in counts), "bad": sum(source["bad"] for source in counts),
            "first": [place for result in results for place in result["skipped"]][:MAX_LISTED],
        },
        "splits": {},
    }  # fmt: skip


def put_together(
    work: Workspace, out: Path, keys: list[str], results: list[dict[str, Any]], manifest: dict[str, Any], tokenizer: Tokenizer
) -> None:  # fmt: skip
    """Make the token folder of finished tasks, and complete the manifest."""
    with new_folder(out) as staging:
        _assemble(staging, work, keys, results, manifest)
        tokenizer.save(staging / "tokenizer")
        manifest["fingerprint"] = fingerprint(cast(Manifest, manifest))
        write_json(staging / "manifest.json", manifest)


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
    """Processes to start: as many as asked for; else one a core, or none beside this one for a few megabytes."""
    if asked is not None:
        if not 1 <= asked <= 4096:
            raise UserError(f"{asked} workers: must be from 1 to 4096")
        return asked
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if total > 16 << 20 else 1


def _trained(
    work: Workspace, tasks: list[Task], sources: list[Source], split: SplitRule, reading: ReadSettings, on_bad: str,
    vocab_size: int, say: Say,
) -> Tokenizer:  # fmt: skip
    """A tokenizer trained on the training texts, or the one that an earlier run trained on the same."""
    content = [[asdict(task) for task in tasks], asdict(split), asdict(reading), on_bad, vocab_size]
    folder = work.path / f"trained-{hashlib.sha256(orjson.dumps(content)).hexdigest()[:32]}"
    if (folder / "tokenizer.json").is_file():
        trained = Tokenizer.load(folder)
        trained.name = "byte-level BPE"
        return trained
    size = sum(
        text_size(path, path.stat().st_size) for source in sources for path in source.files()
    )
    share = min(1.0, TRAINING_BYTES / max(1, size))
    if share < 1:
        say(
            f"the tokenizer is trained on {share:.2%} of the documents, about {TRAINING_BYTES >> 20} MiB"
        )
    trained = train_bpe(training_texts(sources, split, reading, on_bad, share), vocab_size)
    trained.save(folder)
    return trained


def _counts(sources: list[Source], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's entry for each source, the given ones first. Checks that no record is lost."""
    files = {path: (size, sha256) for result in results for path, size, sha256 in result["files"]}
    found: dict[str, dict[str, int]] = {}
    for result in results:
        for name, count in result["counts"].items():
            before = found.setdefault(name, dict.fromkeys(count, 0))
            for key, value in count.items():
                before[key] += value
    named = {source.name: source for source in sources}
    order = [
        *(name for name in named if name in found),
        *sorted(name for name in found if name not in named),
    ]
    entries = []
    for name in order:
        count = found[name]
        assert count["records"] == count["documents"] + count["empty"] + count["bad"], (
            f"documents of {name} were lost: {count}"
        )
        if not count["records"] and len(order) > 1:
            continue  # its samples all name other sources
        own = [named[name]] if name in named else [source for source in sources if not source.given]
        described = [
            {"path": path.name, "bytes": files[str(path)][0], "sha256": files[str(path)][1]}
            for source in own for path in source.files() if str(path) in files
        ]  # fmt: skip
        # one checksum for all files of a source: over theirs, a line each, in order
        checksums = "".join(f"{file['sha256']}\n" for file in described)
        weight = named[name].weight if name in named else None
        entries.append(
            {
                "name": name, "documents": count["documents"], "tokens": count["tokens"], "bytes": count["bytes"],
                "records": count["records"], "documents_skipped": count["empty"] + count["bad"],
                "empty": count["empty"], "bad": count["bad"],
                **({"weight": weight} if weight is not None else {}),
                "files": described, "sha256": hashlib.sha256(checksums.encode()).hexdigest(),
            }
        )  # fmt: skip
    return entries


def _assemble(
    staging: Path,
    work: Workspace,
    keys: list[str],
    results: list[dict[str, Any]],
    manifest: dict[str, Any],
) -> None:
    """Put the tasks' shards into the folder, in the plan's order: the large ones as they are, the held-out ones joined."""
    order = [source["name"] for source in manifest["sources"]]
    dtype = np.dtype(manifest["dtype"])
    for split in SPLITS:
        (staging / split).mkdir()
        shards: list[dict[str, Any]] = []
        for name in order:
            own = [
                (work.tasks / key / shard["file"], shard)
                for key, result in zip(keys, results, strict=True) for shard in result["shards"]
                if shard["source"] == name and shard["split"] == split
            ]  # fmt: skip
            if split == "train":
                for number, (path, shard) in enumerate(own):
                    target = staging / split / f"{name}-{number:05d}.npy"
                    _link(path, target)
                    _link(ends_file(path), ends_file(target))
                    if "mask_size" in shard:
                        _link(mask_file(path), mask_file(target))
                    shards.append(
                        {k: v for k, v in shard.items() if k != "split"}
                        | {"file": f"{split}/{target.name}"}
                    )
                continue
            writer = ShardWriter(staging, split, name, dtype)
            for path, shard in own:
                ends = np.asarray(map_shard(ends_file(path), ENDS, shard["documents"]))
                trained = None
                if "mask_size" in shard:
                    bits = map_shard(mask_file(path), MASK, mask_bytes(shard["tokens"]))
                    trained = np.unpackbits(bits, count=shard["tokens"]).astype(bool)
                tokens = np.asarray(map_shard(path, dtype, shard["tokens"]))
                writer.add(tokens, shard["bytes"], ends.astype(np.int64), trained)
            shards.extend(cast(list[dict[str, Any]], writer.close()))
        manifest["splits"][split] = {
            key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")
        } | {"shards": shards}


def _link(path: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
