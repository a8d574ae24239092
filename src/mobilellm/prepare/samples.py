"""Tokens as the original's layout: `basepath/1..N/*.jsonl`, shuffled samples dealt to nodes.

    write_layout(work, Path("data/nodes"), finished, manifest, tokenizer, nodes=2, ...)

The tokens of each source, documents end to end, are cut into samples of sequence_length + 1 ids.
What is left after a source's last whole sample is left out, and counted in the manifest. All
samples, of all sources, are put in one order by the seed, and dealt to the nodes in turn, so that
every sample is in exactly one place and nodes differ by at most one. Held-out samples lie in a
folder of their own, which the original does not look into.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mobilellm.data.layout import HELD_OUT
from mobilellm.data.manifest import SPLITS
from mobilellm.data.order import derive_key, permute
from mobilellm.data.shard_file import map_shard
from mobilellm.data.stream import Part, TokenStream
from mobilellm.errors import UserError
from mobilellm.files import new_folder, sha256_file, write_json
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask, Progress
from mobilellm.prepare.task_run import FinishedTask
from mobilellm.tokenizer.tokenizer import Tokenizer

SAMPLES_FORMAT = "mobilellm-samples"
FILE_SAMPLES = 8192  # in one file; about 90 MB


def write_layout(
    work: Workspace,
    out: Path,
    finished: list[FinishedTask],
    manifest: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    nodes: int,
    sequence_length: int,
    seed: int,
    workers: int,
) -> None:
    """Write `out` from tokenized tasks, and complete the manifest.

    `UserError` when there are fewer samples than nodes.
    """
    row = sequence_length + 1
    order = [source["name"] for source in manifest["sources"]]
    job: dict[str, Any] = {
        "row": row,
        "seed": seed,
        "dtype": manifest["dtype"],
        "names": order,
        "splits": {},
    }
    for split in SPLITS:
        own = [
            [
                (str(task.folder / shard["file"]), shard["tokens"])
                for task in finished
                for shard in task.result.shards
                if shard["split"] == split and shard["source"] == name
            ]
            for name in order
        ]
        job["splits"][split] = own
        lengths = [sum(tokens for _, tokens in files) for files in own]
        left_out = {name: length % row for name, length in zip(order, lengths, strict=True)}
        manifest["splits"][split] = {
            "samples": sum(length // row for length in lengths),
            "tokens": sum(length // row * row for length in lengths),
            "tokens_left_out": left_out,
        }
    total = manifest["splits"]["train"]["samples"]
    if total < nodes:
        raise UserError(
            f"{total} samples of {row} ids are too few for {nodes} nodes",
            hint="give more text, or a shorter --sequence-length",
        )
    tasks = [
        {
            "split": "train",
            "node": node,
            "nodes": nodes,
            "first": first,
            "count": min(FILE_SAMPLES, count - first),
            "samples": total,
        }
        for node in range(nodes)
        for count in [(total - node + nodes - 1) // nodes]
        for first in range(0, count, FILE_SAMPLES)
    ]
    held_out = manifest["splits"]["held_out"]["samples"]
    tasks += [
        {
            "split": "held_out",
            "node": 0,
            "nodes": 1,
            "first": first,
            "count": min(FILE_SAMPLES, held_out - first),
            "samples": held_out,
        }
        for first in range(0, held_out, FILE_SAMPLES)
    ]
    content = orjson.dumps([job, [task.folder.name for task in finished]])
    keyed = [
        KeyedTask(
            hashlib.sha256(content + orjson.dumps(task)).hexdigest()[:32], task, task["count"]
        )
        for task in tasks
    ]
    written = work.run("mobilellm.prepare.samples:write_samples", job, keyed, workers=workers)
    files = []
    with new_folder(out) as staging:
        for key, task, result in zip((one.key for one in keyed), tasks, written, strict=True):
            folder = str(task["node"] + 1) if task["split"] == "train" else HELD_OUT
            (staging / folder).mkdir(exist_ok=True)
            name = f"{folder}/{task['first'] // FILE_SAMPLES:05d}.jsonl"
            os.replace(work.tasks / key / "samples.jsonl", staging / name)
            files.append(
                {
                    "file": name,
                    "samples": task["count"],
                    "size": result["size"],
                    "sha256": result["sha256"],
                }
            )
        tokenizer.save(staging / "tokenizer")
        manifest |= {"format": SAMPLES_FORMAT, "nodes": nodes, "sample_ids": row, "files": files}
        write_json(staging / "manifest.json", manifest)


@functools.lru_cache(maxsize=2)
def _streams(job: bytes, split: str) -> list[TokenStream]:
    settings = orjson.loads(job)
    dtype, none = np.dtype(settings["dtype"]), np.empty(0, dtype="<u8")

    def stream(files: list[list[Any]]) -> TokenStream:
        def opener(i: int) -> Part:
            return Part(map_shard(Path(files[i][0]), dtype, files[i][1]), none)

        return TokenStream((tokens for _, tokens in files), opener)

    return [stream(files) for files in settings["splits"][split]]


def write_samples(
    task: dict[str, Any], job: dict[str, Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """One file of one node's samples: `folder/samples.jsonl`."""
    row, names = job["row"], job["names"]
    streams = _streams(orjson.dumps(job), task["split"])
    starts = np.concatenate(([0], np.cumsum([len(stream) // row for stream in streams])))
    places = task["node"] + task["nodes"] * np.arange(task["first"], task["first"] + task["count"])
    chosen = permute(places, task["samples"], derive_key(job["seed"], task["split"], "samples"))
    path = folder / "samples.jsonl"
    with open(path, "wb") as file:
        for number in chosen.tolist():
            source = int(np.searchsorted(starts, number, side="right")) - 1
            ids = streams[source].read((number - int(starts[source])) * row, row)
            file.write(
                orjson.dumps(
                    {"token_ids": np.ascontiguousarray(ids), "source": names[source]},
                    option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE,
                )
            )
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}
