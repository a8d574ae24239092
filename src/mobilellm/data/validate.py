"""Is this data what it says it is: every fault of a token folder, or of the original's layout,
with its place.

report = validate(Path("data/book"))
report.faults           # [("train/book-00000.npy", "its checksum differs ...")]
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mobilellm.data.layout import (
    held_out_folder,
    lines_of,
    node_folders,
    parse_sample,
    sample_files,
)
from mobilellm.data.manifest import SPLITS, ShardEntry, check_manifest
from mobilellm.data.shard_file import ENDS, HEADER_BYTES, check_header, ends_file
from mobilellm.data.token_folder import TokenFolder, shard_files
from mobilellm.errors import UserError
from mobilellm.files import check_file, read_json
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask, Progress
from mobilellm.tokenizer.tokenizer import Tokenizer

MAX_FAULTS = 100  # of one file that are told; all are counted
STEP = 1 << 24  # tokens looked at at once


@dataclass
class Report:
    """What was found."""

    kind: str
    """ "token folder" or "samples"."""
    files: int = 0
    tokens: int = 0
    records: int = 0
    """Documents, or samples."""
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(place, what is wrong there), the first of each file."""
    faults_in_all: int = 0
    nodes: list[int] = field(default_factory=list)
    """Samples of each node."""


def validate(
    path: Path,
    *,
    tokenizer: Tokenizer | None = None,
    sequence_length: int | None = None,
    workers: int = 1,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Report:
    """Check a token folder, the original's layout, or one .jsonl file of samples, with `workers`
    processes.

    Samples have 2,048 or 2,049 ids unless a `sequence_length`, or the manifest beside them, says
    otherwise; the range of ids is checked where a tokenizer is known. `UserError` only when
    there is nothing to check.
    """
    nodes = node_folders(path) if path.is_dir() else []
    job: dict[str, Any]
    if path.is_file() or nodes:
        report = Report("samples")
        lengths: tuple[int, ...] = (
            (sequence_length, sequence_length + 1) if sequence_length else (2048, 2049)
        )
        manifest = read_json(path / "manifest.json") if (path / "manifest.json").is_file() else {}
        if (
            not sequence_length
            and isinstance(manifest, dict)
            and isinstance(manifest.get("sample_ids"), int)
        ):
            lengths = (manifest["sample_ids"],)
        if tokenizer is None and (path / "tokenizer").is_dir():
            tokenizer = Tokenizer.load(path / "tokenizer")
        job = {"lengths": list(lengths), "vocab_size": tokenizer.vocab_size if tokenizer else None}
        files = (
            [path]
            if path.is_file()
            else [f for folder in [*nodes, held_out_folder(path)] for f in sample_files(folder)]
        )
        if not files:
            raise UserError(f"{path}: its folders hold no .jsonl file")
        tasks = [{"file": str(file), "check": "samples"} for file in files]
        _compare(report, path, manifest, nodes)
    elif (path / "manifest.json").is_file():
        report = Report("token folder")
        manifest = read_json(path / "manifest.json")
        try:
            check_manifest(manifest, path / "manifest.json")
            folder = TokenFolder(path, manifest)
            folder.tokenizer()
        except UserError as error:
            report.faults.append(
                ("manifest.json" if "manifest" in error.what else "tokenizer", str(error))
            )
            report.faults_in_all += 1
            if "manifest.json" in error.what:
                return report
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        dtype = np.dtype(manifest["dtype"])
        names = {
            str(name.relative_to(path))
            for shard in shards
            for name, *_ in shard_files(path, shard, dtype)
        }
        for split in {Path(name).parent for name in names} | set(SPLITS):
            for extra in sorted((path / split).glob("*")):
                if str(extra.relative_to(path)) not in names:
                    report.faults.append((str(extra.relative_to(path)), "not in the manifest"))
                    report.faults_in_all += 1
        job = {key: manifest[key] for key in ("dtype", "eos", "eos_id")} | {
            "vocab_size": manifest["tokenizer"]["vocab_size"]
        }
        tasks = [
            {"file": str(path / shard["file"]), "check": "shard", "shard": shard}
            for shard in shards
        ]
    else:
        raise UserError(
            f"{path}: neither a token folder (manifest.json) nor samples (1/*.jsonl, 2/*.jsonl, "
            "...)"
        )
    weights = [
        float(os.path.getsize(task["file"])) if os.path.exists(task["file"]) else 0.0
        for task in tasks
    ]
    with tempfile.TemporaryDirectory() as scratch:
        work = Workspace(Path(scratch) / "check")
        work.tasks.mkdir(parents=True)
        keyed = [
            KeyedTask(hashlib.sha256(orjson.dumps(task)).hexdigest()[:32], task, weight)
            for task, weight in zip(tasks, weights, strict=True)
        ]
        found = work.run(
            "mobilellm.data.validate:check",
            job,
            keyed,
            workers=workers,
            progress=lambda done: progress(done, sum(weights)),
        )
    for task, result in zip(tasks, found, strict=True):
        place = Path(task["file"])
        shown = str(place.relative_to(path)) if place != path else place.name
        report.files += 1
        report.tokens += result["tokens"]
        report.records += result["records"]
        report.faults += [(shown + where, what) for where, what in result["faults"]]
        report.faults_in_all += result["count"]
    if nodes:
        counts = {str(node): 0 for node in nodes}
        for task, result in zip(tasks, found, strict=True):
            if (parent := str(Path(task["file"]).parent)) in counts:
                counts[parent] += result["records"]
        report.nodes = list(counts.values())
        if not report.faults_in_all and max(report.nodes) - min(report.nodes) > 1:
            report.faults.append(
                (
                    "",
                    (
                        f"nodes have {min(report.nodes)} to {max(report.nodes)} samples: they may "
                        "differ by one at most"
                    ),
                )
            )
            report.faults_in_all += 1
    return report


def _compare(report: Report, path: Path, manifest: Any, nodes: list[Path]) -> None:
    """Nodes that are missing, and files that differ from what a manifest of ours says."""
    numbers = [int(node.name) for node in nodes]
    missing = [str(n) for n in range(1, max(numbers, default=0) + 1) if n not in numbers]
    faults = [
        (f"{number}/", "no such node's folder, and later ones are there") for number in missing
    ]
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), list):
        for entry in manifest["files"]:
            try:
                check_file(path / entry["file"], size=entry["size"], sha256=entry["sha256"])
            except UserError as error:
                faults.append((entry["file"], error.what.removeprefix(f"{path / entry['file']}: ")))
    report.faults += faults
    report.faults_in_all += len(faults)


def check(
    task: dict[str, Any], job: dict[str, Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """A task of `mobilellm.jobs`: check one file. Nothing is written; the faults are the result."""
    path = Path(task["file"])
    if task["check"] == "samples":
        return check_samples(path, job)
    return check_shard(path, task["shard"], job)


def check_samples(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Every line of a file of samples."""
    faults: list[tuple[str, str]] = []
    count = records = tokens = 0
    prefix = f"{path}"

    def fault(where: str, what: str) -> None:
        nonlocal count
        count += 1
        if len(faults) < MAX_FAULTS:
            faults.append((where, what))

    try:
        for where, line in lines_of(path):
            records += 1
            try:
                ids, _ = parse_sample(line, where, job["vocab_size"])
                tokens += len(ids)
                if len(ids) not in job["lengths"]:
                    fault(
                        where.removeprefix(prefix),
                        f"{len(ids)} ids, must be {' or '.join(map(str, job['lengths']))}",
                    )
            except UserError as error:
                fault(where.removeprefix(prefix), error.what.removeprefix(f"{where}: "))
    except UserError as error:
        fault("", error.what.removeprefix(f"{prefix}"))
    return {"records": records, "tokens": tokens, "faults": faults, "count": count}


def check_shard(path: Path, shard: ShardEntry, job: dict[str, Any]) -> dict[str, Any]:
    """A shard and its document ends: sizes, headers, checksums, ids in range, ends in order, an
    EOS at each."""
    faults: list[tuple[str, str]] = []
    ends_path, dtype = ends_file(path), np.dtype(job["dtype"])
    sound = True
    folder = path.parent.parent
    for name, size, sha256, kind, count in shard_files(folder, shard, dtype):
        shown = "" if name == path else f" ({name.name})"
        try:
            if name.stat().st_size == size:
                check_header(name, kind, count)
            check_file(name, size=size, sha256=sha256)
        except UserError as error:
            faults.append((shown, error.what.removeprefix(f"{name}: ")))
            sound = sound and "checksum" in error.what
        except OSError as error:
            faults.append((shown, f"cannot be read ({error.strerror or error})"))
            sound = False
    if sound and shard["tokens"]:
        tokens = np.memmap(
            path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(shard["tokens"],)
        )
        ends = np.memmap(
            ends_path, dtype=ENDS, mode="r", offset=HEADER_BYTES, shape=(shard["documents"],)
        ).astype(np.int64)
        for start in range(0, len(tokens), STEP):
            piece = np.asarray(tokens[start : start + STEP])
            if int(piece.max()) >= job["vocab_size"]:
                at = start + int(np.argmax(piece >= job["vocab_size"]))
                faults.append(
                    (f" token {at}", f"id {int(tokens[at])}, must be below {job['vocab_size']}")
                )
                break
        wrong = np.flatnonzero(np.diff(ends, prepend=0) < 0)
        if len(wrong):
            faults.append(
                (f" ({ends_path.name})", f"document {int(wrong[0])} ends before it begins")
            )
        elif not len(ends) or ends[-1] != len(tokens):
            faults.append(
                (
                    f" ({ends_path.name})",
                    (
                        f"the last document ends at {int(ends[-1]) if len(ends) else 0} of "
                        f"{len(tokens)} tokens"
                    ),
                )
            )
    return {
        "records": shard["documents"],
        "tokens": shard["tokens"],
        "faults": faults,
        "count": len(faults),
    }
