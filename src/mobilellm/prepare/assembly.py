"""Finished tasks put together: the manifest, and the token folder in the order of the plan.

manifest = describe(sources, [task.result for task in finished], tokenizer, split, ...)
put_together(Path("data/book"), finished, manifest, tokenizer)
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np

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
from mobilellm.files import new_folder, write_json
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import MAX_LISTED, Count, FinishedTask, TaskResult
from mobilellm.tokenizer.encoder import library_version
from mobilellm.tokenizer.tokenizer import Tokenizer


def describe(
    sources: list[Source],
    results: list[TaskResult],
    tokenizer: Tokenizer,
    split: SplitRule,
    *,
    bos: bool,
    eos: bool,
    library: str,
    reason: str,
) -> dict[str, Any]:
    """The manifest of tokenized tasks, but for the shards."""
    counts = _counts(sources, results)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "bos": bos,
        "eos": eos,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "held_out": {"rule": split.rule, "fraction": split.fraction, "tails": list(split.tails)},
        "seed": split.seed,
        "encoder": {
            "library": library_version(library),
            "documents_verified": sum(result.verified for result in results),
            "not_faster_because": reason or None,
        },
        "sources": counts,
        "skipped": {
            "empty": sum(source["empty"] for source in counts),
            "bad": sum(source["bad"] for source in counts),
            "first": [place for result in results for place in result.skipped][:MAX_LISTED],
        },
        "splits": {},
    }


def put_together(
    out: Path, finished: list[FinishedTask], manifest: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Make the token folder `out` of finished tasks, and complete the manifest."""
    with new_folder(out) as staging:
        _assemble(staging, finished, manifest)
        tokenizer.save(staging / "tokenizer")
        manifest["fingerprint"] = fingerprint(cast(Manifest, manifest))
        write_json(staging / "manifest.json", manifest)


def _counts(sources: list[Source], results: list[TaskResult]) -> list[dict[str, Any]]:
    """The manifest's entry for each source, the given ones first. Checks that no record is lost."""
    files = {path: (size, sha256) for result in results for path, size, sha256 in result.files}
    found: dict[str, Count] = {}
    for result in results:
        for name, count in result.counts.items():
            found.setdefault(name, Count()).add(count)
    named = {source.name: source for source in sources}
    order = [
        *(name for name in named if name in found),
        *sorted(name for name in found if name not in named),
    ]
    entries = []
    for name in order:
        count = found[name]
        assert count.records == count.documents + count.empty + count.bad, (
            f"documents of {name} were lost: {count}"
        )
        if not count.records and len(order) > 1:
            continue  # its samples all name other sources
        own = [named[name]] if name in named else [source for source in sources if not source.given]
        described = [
            {"path": path.name, "bytes": files[str(path)][0], "sha256": files[str(path)][1]}
            for source in own
            for path in source.files()
            if str(path) in files
        ]
        # One checksum for all files of a source: over theirs, a line each, in order.
        checksums = "".join(f"{file['sha256']}\n" for file in described)
        weight = named[name].weight if name in named else None
        entries.append(
            {
                "name": name,
                "documents": count.documents,
                "tokens": count.tokens,
                "bytes": count.bytes,
                "records": count.records,
                "documents_skipped": count.empty + count.bad,
                "empty": count.empty,
                "bad": count.bad,
                **({"weight": weight} if weight is not None else {}),
                "files": described,
                "sha256": hashlib.sha256(checksums.encode()).hexdigest(),
            }
        )
    return entries


def _assemble(staging: Path, finished: list[FinishedTask], manifest: dict[str, Any]) -> None:
    """Put the tasks' shards into the folder, in the plan's order.

    The large ones of the training split are taken as they are, the held-out ones are joined.
    """
    order = [source["name"] for source in manifest["sources"]]
    dtype = np.dtype(manifest["dtype"])
    for split in SPLITS:
        (staging / split).mkdir()
        shards: list[dict[str, Any]] = []
        for name in order:
            own = [
                (task.folder / shard["file"], shard)
                for task in finished
                for shard in task.result.shards
                if shard["source"] == name and shard["split"] == split
            ]
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
