"""Tokens to train on, whatever they lie in: a folder of shards, or the original's layout of JSON
lines.

    data = open_dataset(Path("data/book"))
    # Basepath/1..N/*.jsonl.
    data = open_dataset(Path("basepath"), tokenizer=Path("tokenizer.model"))
    data.sources(), data.tokens("train", "c4"), data.fingerprint

JSON lines are read once, when they are first opened: their ids go into a cache of flat arrays
beside them (or, where one may not write there, under ~/.cache/mobilellm), and later starts
compare only the files' sizes and times with it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import orjson

from mobilellm.damage import reading
from mobilellm.data.layout import (
    ends_in,
    held_out_folder,
    lines_of,
    node_folders,
    parse_sample,
    sample_files,
)
from mobilellm.data.manifest import SPLITS, ShardEntry
from mobilellm.data.order import derive_key
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.stream import TokenStream
from mobilellm.data.token_folder import TokenFolder, shard_files, shard_stream
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.files import (
    cache_folder,
    check_file,
    locked,
    new_folder,
    plain_name,
    read_json,
    sha256_file,
    sweep_partial,
    write_json,
)
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask, Progress
from mobilellm.schema import AtLeast, fault_of
from mobilellm.tokenizer.tokenizer import Tokenizer


class Index(TypedDict):
    """index.json beside the original's layout: what its lines were read into."""

    state: dict[str, Any]
    """What it was made from: another one makes it again."""
    dtype: str
    row: Annotated[int, AtLeast(3)]
    """Ids in a sample."""
    splits: dict[str, list[ShardEntry]]
    sha256: list[str]
    """Of the files that were read."""


CACHE = ".mobilellm-index"
INDEX_VERSION = 3
MAX_OPEN = 128  # sources whose files are open at once
PARALLEL_BYTES = (
    64 << 20
)  # of JSON lines above which they are read by as many processes as there are cores


def open_dataset(
    path: Path, tokenizer: Path | Tokenizer | None = None, verify: bool = False
) -> Data:
    """Open a token folder, or the original layout, which needs to be told its `tokenizer` unless
    one lies in it.

    `verify` compares checksums too. `UserError` when it is neither, when something is damaged,
    and when a token folder was made with another tokenizer than the one given.
    """
    with reading(path, "prepared data"):
        return _opened(path, tokenizer, verify)


def _opened(path: Path, tokenizer: Path | Tokenizer | None, verify: bool) -> Data:
    given = Tokenizer.load(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    if (path / "manifest.json").is_file() and not node_folders(path):
        folder = TokenFolder.open(path, verify)
        if given is not None and given.sha256 != folder.tokenizer().sha256:
            raise UserError(
                f"{path}: made with another tokenizer than {given.name!r}",
                hint="prepare the data again, or give its own",
            )
        return folder
    if not node_folders(path):
        return TokenFolder.open(path, verify)  # which says what is missing
    if given is None:
        own = next(
            (
                p
                for p in (path / "tokenizer", path / "tokenizer.json", path / "tokenizer.model")
                if p.exists()
            ),
            None,
        )
        if own is None:
            raise UserError(
                f"{path}: samples without a tokenizer",
                hint=f"name theirs, or put it into {path / 'tokenizer'}",
            )
        given = Tokenizer.load(own)
    return SampleFolder.open(path, given, verify)


class SampleFolder:
    """The original layout, opened: rows of ids that stay rows."""

    def __init__(
        self, path: Path, tokenizer: Tokenizer, cache: Path, index: dict[str, Any]
    ) -> None:
        self.path, self.cache, self.index = path, cache, index
        self.vocab_size, self.bos_id, self.eos_id = (
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        self.row: int = index["row"]
        """Ids in a sample."""
        self.masked = False  # this layout cannot say what is not trained on
        self.preferences = None  # nor hold pairs of answers
        content = {
            "tokenizer": tokenizer.sha256,
            "row": self.row,
            "shards": [[s["source"], s["sha256"]] for s in self._shards()],
        }
        self.fingerprint = hashlib.sha256(
            orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
        ).hexdigest()
        self._given = tokenizer

    @classmethod
    def open(
        cls, path: Path, tokenizer: Tokenizer, verify: bool = False, held_out: float = 0.01
    ) -> SampleFolder:
        """Open, reading the JSON lines only when they have changed since the last time.

        Held out are the samples in `path/held_out`; where there is no such folder, about the
        fraction `held_out` of all, chosen by hash. `UserError` with file and line for what is
        not a sample, and for samples of unequal length.
        """
        files = _files(path)
        parts: list[list[Any]] = [
            [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
        ]
        state = {
            "version": INDEX_VERSION,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "held_out": held_out,
            "files": parts,
        }
        cache = _cache(path)
        with _alone(cache):
            index = _read_index(cache)
            if index is None or index["state"] != state:
                index = _build(path, cache, files, state, tokenizer, held_out)
        folder = cls(path, tokenizer, cache, index)
        dtype = np.dtype(index["dtype"])
        for shard in folder._shards():
            for name, size, sha256, _, _ in shard_files(cache, shard, dtype):
                if verify:
                    check_file(name, size=size, sha256=sha256)
                elif not name.is_file() or name.stat().st_size != size:
                    raise UserError(
                        f"{name}: the index of {path} is damaged",
                        hint=f"remove {cache}; it is made again",
                    )
        if verify:
            for (name, size, _), sha256 in zip(parts, index["sha256"], strict=True):
                check_file(path / name, size=size, sha256=sha256)
        return folder

    def _shards(self, split: str | None = None) -> list[ShardEntry]:
        return [
            shard
            for part in SPLITS
            if split in (None, part)
            for shard in self.index["splits"][part]
        ]

    @property
    def prefix_id(self) -> int | None:
        """The token put before held-out rows: an EOS, which ends what came before them."""
        return self.eos_id

    def tokens(self, split: str, source: str | None = None) -> TokenStream:
        """The rows of a split ("train" or "held_out"), of all sources or one, end to end."""
        shards = [shard for shard in self._shards(split) if source in (None, shard["source"])]
        return shard_stream(self.cache, shards, np.dtype(self.index["dtype"]), row=self.row)

    def sources(self) -> list[str]:
        """The sources that samples name, sorted."""
        return sorted({shard["source"] for shard in self._shards()})

    def weights(self) -> dict[str, float]:
        """Shares to mix the sources by: in proportion to their tokens."""
        return {name: float(len(self.tokens("train", name))) for name in self.sources()}

    @functools.cache  # noqa: B019  (a folder lives as long as the run)
    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that a split was made from. Every row is decoded, which takes
        its time for a large split."""
        stream = self.tokens(split)
        rows = (stream.read(start, self.row).tolist() for start in range(0, len(stream), self.row))
        return sum(len(self._given.decode(row, skip_special_tokens=True).encode()) for row in rows)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was named when this was opened."""
        return self._given


Data = TokenFolder | SampleFolder
"""What a run trains on."""


def _files(path: Path) -> list[Path]:
    files = [
        file
        for folder in (*node_folders(path), held_out_folder(path))
        for file in sample_files(folder)
    ]
    if not files:
        raise UserError(f"{path}: its folders hold no .jsonl file")
    return files


def _cache(path: Path) -> Path:
    """Where the index of this folder lies: in it, or in the user's cache when it cannot be
    written to."""
    if os.access(path, os.W_OK) or (path / CACHE).is_dir():
        return path / CACHE
    return cache_folder() / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Only one process at a time reads the JSON lines; the others wait for it, and then find the
    index."""
    if (cache / "index.json").is_file() and not os.access(cache.parent, os.W_OK):
        yield
        return
    with locked(cache.with_name(f"{cache.name}.lock"), cache):
        yield


def _read_index(cache: Path) -> dict[str, Any] | None:
    """The index, or None where there is none, or one that is damaged: it is made again."""
    try:
        index = read_json(cache / "index.json")
    except UserError:
        return None
    if fault_of(index, Index) or index["state"].get("version") != INDEX_VERSION:
        return None
    for split in SPLITS:
        for shard in index["splits"].get(split, ()):
            folder, _, name = shard["file"].partition("/")
            if folder != split or "/" in name or not name.endswith(".npy"):
                return None
            if not plain_name(shard["file"]):
                return None
    if index["splits"].keys() != set(SPLITS) or index["dtype"] not in ("<u2", "<u4"):
        return None
    return dict(index)


def _build(
    path: Path,
    cache: Path,
    files: list[Path],
    state: dict[str, Any],
    tokenizer: Tokenizer,
    held_out: float,
) -> dict[str, Any]:
    """Read every JSON line into flat arrays under `cache`, a file a task, and return the index
    that describes them."""
    if cache.exists():
        shutil.rmtree(cache)
    sweep_partial(cache.parent, cache.name)
    own_split = bool(sample_files(held_out_folder(path)))
    row = next(
        (len(parse_sample(line, where)[0]) for file in files for where, line in lines_of(file)), 0
    )
    if row < 3:
        raise UserError(
            f"{path}: no sample in its {len(files)} files"
            if not row
            else f"{path}: samples of {row} ids"
        )
    job = {
        "row": row,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "held_out": held_out,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "version": INDEX_VERSION,
        "forced": None,
    }
    tasks = [
        {
            "file": str(file),
            "number": number,
            "split": None
            if not own_split
            else "held_out"
            if file.parent == held_out_folder(path)
            else "train",
        }
        for number, file in enumerate(files)
    ]
    weights = [float(size) for _, size, _ in state["files"]]
    workers = (os.cpu_count() or 1) if sum(weights) > PARALLEL_BYTES else 1

    def read(work: Workspace) -> tuple[list[str], list[dict[str, Any]]]:
        keys = [
            hashlib.sha256(orjson.dumps([job, task, part])).hexdigest()[:32]
            for task, part in zip(tasks, state["files"], strict=True)
        ]
        keyed = [
            KeyedTask(key, task, weight)
            for key, task, weight in zip(keys, tasks, weights, strict=True)
        ]
        return keys, work.run("mobilellm.data.dataset:index_file", job, keyed, workers=workers)

    with Workspace.open(cache) as work:
        keys, results = read(work)
        samples = {split: sum(result[split] for result in results) for split in SPLITS}
        if not samples["held_out"] and not own_split:
            if samples["train"] == 1:
                raise UserError(
                    f"{path}: a single sample is too little to train on and hold out from"
                )
            first = next(number for number, result in enumerate(results) if result["train"])
            job["forced"] = first  # the first sample of all
            keys, results = read(work)
        index: dict[str, Any] = {
            "state": state,
            "dtype": job["dtype"],
            "row": row,
            "splits": {split: [] for split in SPLITS},
        }
        index["sha256"] = [result["sha256"] for result in results]
        with new_folder(cache) as staging:
            for split in SPLITS:
                (staging / split).mkdir()
                own = [
                    (shard["source"], number, key, shard)
                    for number, (key, result) in enumerate(zip(keys, results, strict=True))
                    for shard in result["shards"]
                    if shard["split"] == split
                ]
                for name, (source, _, key, shard) in enumerate(
                    sorted(own, key=lambda one: one[:2])
                ):
                    target = staging / split / f"{name:06d}.npy"
                    before = work.tasks / key / shard["file"]
                    os.replace(before, target)
                    os.replace(before.with_suffix(".ends.npy"), target.with_suffix(".ends.npy"))
                    index["splits"][split].append(
                        shard | {"file": f"{split}/{target.name}", "source": source}
                    )
            write_json(staging / "index.json", index)
    return index


def index_file(
    task: dict[str, Any], job: dict[str, Any], folder: Path, progress: Progress
) -> dict[str, Any]:
    """One file of samples as flat arrays in `folder`. `UserError` with file and line for what is
    not a sample like the others."""
    dtype, row, file = np.dtype(job["dtype"]), job["row"], Path(task["file"])
    writers: dict[tuple[str, str], ShardWriter] = {}
    used: dict[tuple[str, str], None] = {}
    names: dict[str, str] = {}
    counts = dict.fromkeys(SPLITS, 0)
    for number, (where, line) in enumerate(lines_of(file)):
        ids, source = parse_sample(line, where, job["vocab_size"])
        if len(ids) != row:
            raise UserError(
                f"{where}: {len(ids)} ids, where the first sample has {row}",
                hint="`mobilellm prepare --validate` lists every sample that does not fit",
            )
        split = task["split"] or (
            "held_out"
            if derive_key(0, "sample", task["number"], number) / 2.0**64 < job["held_out"]
            else "train"
        )
        if job["forced"] == task["number"] and number == 0:
            split = "held_out"
        if (source, split) not in writers:
            label = names.setdefault(
                source, f"source{len(names)}"
            )  # a file name that no source can choose
            writers[source, split] = ShardWriter(folder, split, label, dtype)
        writers[source, split].add(ids, 0, ends_in(ids, job["eos_id"]))
        used.pop((source, split), None)
        used[source, split] = None  # the last used comes last
        if len(used) > MAX_OPEN:
            oldest = next(iter(used))
            writers[oldest].park()
            del used[oldest]
        counts[split] += 1
    shards = [
        entry | {"source": source, "split": split}
        for (source, split), writer in writers.items()
        for entry in writer.close()
    ]
    return {**counts, "shards": shards, "sha256": sha256_file(file)}
