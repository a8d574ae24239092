"""Tokens to train on, whatever they lie in: a folder of shards, or the original's layout of JSON lines.

    data = open_dataset(Path("data/book"))
    data = open_dataset(Path("basepath"), tokenizer=Path("tokenizer.model"))      # basepath/1..N/*.jsonl
    data.sources(), data.tokens("train", "c4"), data.fingerprint

JSON lines are read once, when they are first opened: their ids go into a cache of flat arrays beside them (or, where one may
not write there, under ~/.cache/mobilellm), and later starts compare only the files' sizes and times with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.data.order import derive_key
from mobilellm.data.original import HELD_OUT, LONGEST_SAMPLE, node_folders, parse_sample, sample_files
from mobilellm.data.shards import ENDS, SPLITS, ShardWriter, TokenFolder, TokenStream, map_shard, token_dtype
from mobilellm.data.tokenizer import Tokenizer
from mobilellm.errors import UserError
from mobilellm.files import check_file, new_folder, read_json, sha256_file, sweep_partial, write_json

CACHE = ".mobilellm-index"
INDEX_VERSION = 1


def open_dataset(path: Path, tokenizer: Path | Tokenizer | None = None, verify: bool = False) -> TokenFolder | SampleFolder:
    """Open a token folder, or the original layout, which needs to be told its `tokenizer` unless one lies in it.

    `verify` compares checksums too. `UserError` when it is neither, when something is damaged, and when a token folder was
    made with another tokenizer than the one given.
    """
    given = Tokenizer.load(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    if (path / "manifest.json").is_file() and not node_folders(path):
        folder = TokenFolder.open(path, verify)
        if given is not None and given.sha256 != folder.tokenizer().sha256:
            raise UserError(
                f"{path}: made with another tokenizer than {given.name!r}", mend="prepare the data again, or give its own"
            )
        return folder
    if not node_folders(path):
        return TokenFolder.open(path, verify)  # which says what is missing
    if given is None:
        own = next((p for p in (path / "tokenizer", path / "tokenizer.json", path / "tokenizer.model") if p.exists()), None)
        if own is None:
            raise UserError(f"{path}: samples without a tokenizer", mend=f"name theirs, or put it into {path / 'tokenizer'}")
        given = Tokenizer.load(own)
    return SampleFolder.open(path, given, verify)


class SampleFolder:
    """The original layout, opened: rows of ids that stay rows."""

    def __init__(self, path: Path, tokenizer: Tokenizer, cache: Path, index: dict[str, Any]) -> None:
        self.path, self.cache, self.index = path, cache, index
        self.vocab_size, self.bos_id, self.eos_id = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
        self.row: int = index["row"]
        """Ids in a sample."""
        content = {"tokenizer": tokenizer.sha256, "row": self.row, "shards": [[s["source"], s["sha256"]] for s in self._shards()]}
        self.fingerprint = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
        self._given = tokenizer

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, verify: bool = False, held_out: float = 0.01) -> SampleFolder:
        """Open, reading the JSON lines only when they have changed since the last time.

        Held out are the samples in `path/heldout`; where there is no such folder, about the fraction `held_out` of all,
        chosen by hash. `UserError` with file and line for what is not a sample, and for samples of unequal length.
        """
        files = _files(path)
        parts: list[list[Any]] = [[str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        state = {
            "version": INDEX_VERSION, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id,
            "held_out": held_out, "files": parts,
        }  # fmt: skip
        cache = _cache(path)
        with _locked(cache):
            index = _read_index(cache)
            if index is None or index["state"] != state:
                index = _build(path, cache, files, state, tokenizer, held_out)
        folder = cls(path, tokenizer, cache, index)
        for shard in folder._shards():
            for name, key in ((cache / shard["file"], ""), ((cache / shard["file"]).with_suffix(".ends.npy"), "ends_")):
                if verify:
                    check_file(name, size=shard[key + "size"], sha256=shard[key + "sha256"])
                elif not name.is_file() or name.stat().st_size != shard[key + "size"]:
                    raise UserError(f"{name}: the index of {path} is damaged", mend=f"remove {cache}; it is made again")
        if verify:
            for (name, size, _), sha256 in zip(parts, index["sha256"], strict=True):
                check_file(path / name, size=size, sha256=sha256)
        return folder

    def _shards(self, split: str | None = None) -> list[dict[str, Any]]:
        return [shard for part in SPLITS if split in (None, part) for shard in self.index["splits"][part]]

    def tokens(self, split: str, source: str | None = None) -> TokenStream:
        """The rows of a split ("train" or "heldout"), of all sources or one, end to end."""
        shards = [shard for shard in self._shards(split) if source in (None, shard["source"])]
        dtype = np.dtype(self.index["dtype"])

        def opener(i: int) -> tuple[NDArray[Any], NDArray[Any]]:
            file = self.cache / shards[i]["file"]
            ends = map_shard(file.with_suffix(".ends.npy"), ENDS, shards[i]["documents"], scattered=True)
            return map_shard(file, dtype, shards[i]["tokens"], scattered=True), ends

        return TokenStream((shard["tokens"] for shard in shards), opener, row=self.row)

    def sources(self) -> list[str]:
        """The sources that samples name, sorted."""
        return sorted({shard["source"] for shard in self._shards()})

    def weights(self) -> dict[str, float]:
        """Shares to mix the sources by: in proportion to their tokens."""
        return {name: float(len(self.tokens("train", name))) for name in self.sources()}

    @functools.cache  # noqa: B019  (a folder lives as long as the run)
    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text behind a split: every row decoded, which takes its time for a large one."""
        stream = self.tokens(split)
        rows = (stream.read(start, self.row).tolist() for start in range(0, len(stream), self.row))
        return sum(len(self._given.decode(row, skip_special_tokens=True).encode()) for row in rows)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was named when this was opened."""
        return self._given


def _files(path: Path) -> list[Path]:
    files = [file for folder in (*node_folders(path), path / HELD_OUT) for file in sample_files(folder)]
    if not files:
        raise UserError(f"{path}: its folders hold no .jsonl file")
    return files


def _cache(path: Path) -> Path:
    """Where the index of this folder lies: in it, or in the user's cache when it cannot be written to."""
    if os.access(path, os.W_OK) or (path / CACHE).is_dir():
        return path / CACHE
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "mobilellm" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Only one process at a time reads the JSON lines; the others wait for it, and then find the index."""
    if (cache / "index.json").is_file() and not os.access(cache.parent, os.W_OK):
        yield
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.with_name(f"{cache.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_index(cache: Path) -> dict[str, Any] | None:
    try:
        index = read_json(cache / "index.json")
        if index["state"]["version"] != INDEX_VERSION:
            return None
        for split in SPLITS:
            for shard in index["splits"][split]:
                folder, _, name = shard["file"].partition("/")
                if folder != split or "/" in name or not name.endswith(".npy"):
                    return None
        return dict(index)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _build(
    path: Path, cache: Path, files: list[Path], state: dict[str, Any], tokenizer: Tokenizer, held_out: float
) -> dict[str, Any]:  # fmt: skip
    """Read every JSON line into flat arrays under `cache`, and return the index that describes them."""
    import shutil

    sweep_partial(cache.parent, cache.name)
    if cache.exists():
        shutil.rmtree(cache)
    dtype = token_dtype(tokenizer.vocab_size)
    own_split = bool(sample_files(path / HELD_OUT))
    index: dict[str, Any] = {"state": state, "dtype": dtype.str, "sha256": [], "sources": [], "splits": {}}
    with new_folder(cache) as staging:
        writers: dict[tuple[str, str], ShardWriter] = {}
        names: dict[str, str] = {}
        row = number = 0
        waiting: tuple[NDArray[np.uint32], str] | None = None  # the first sample: held out if no other is
        any_held_out = own_split

        def add(ids: NDArray[np.uint32], source: str, split: str) -> None:
            label = names.setdefault(source, f"source{len(names)}")  # a file name that no source can choose
            if (source, split) not in writers:
                writers[source, split] = ShardWriter(staging, split, label, dtype)
            writers[source, split].add(ids, 0, ends_in(ids, tokenizer.eos_id))

        for file in files:
            fixed = HELD_OUT if file.parent == path / HELD_OUT else "train" if own_split else None
            for where, line in lines_of(file):
                ids, source = parse_sample(line, where, tokenizer.vocab_size)
                row = row or len(ids)
                if len(ids) != row or row < 3:
                    raise UserError(
                        f"{where}: {len(ids)} ids, where the first sample has {row}",
                        mend="`mobilellm prepare --validate` lists every sample that does not fit",
                    )
                split = fixed or ("heldout" if derive_key(0, "sample", number) / 2.0**64 < held_out else "train")
                any_held_out = any_held_out or split == "heldout"
                number += 1
                if waiting is None and fixed is None:
                    waiting = ids, source
                    continue
                add(ids, source, split)
            index["sha256"].append(sha256_file(file))
        if waiting is not None:
            add(*waiting, "train" if any_held_out else "heldout")
        if not number:
            raise UserError(f"{path}: no sample in its {len(files)} files")
        if row and not own_split and number == 1:
            raise UserError(f"{path}: a single sample is too little to train on and hold out from")
        for split in SPLITS:
            index["splits"][split] = [
                entry | {"source": source}
                for (source, part), writer in sorted(writers.items()) if part == split for entry in writer.close()
            ]  # fmt: skip
        index["row"] = row
        write_json(staging / "index.json", index)
    return index


def ends_in(ids: NDArray[Any], eos_id: int | None) -> NDArray[np.int64]:
    """Where documents end within a row: behind each EOS, and at the row's end."""
    after = np.flatnonzero(ids == eos_id) + 1 if eos_id is not None else np.empty(0, dtype=np.int64)
    return after if len(after) and after[-1] == len(ids) else np.append(after, len(ids))


def lines_of(file: Path) -> Iterator[tuple[str, bytes]]:
    """("file:number", line) of every line that is not blank. `UserError` for a line too long to be a sample."""
    try:
        with open(file, "rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_SAMPLE):
                number += 1
                if len(line) == LONGEST_SAMPLE and not line.endswith(b"\n"):
                    raise UserError(f"{file}:{number}: a line of more than {LONGEST_SAMPLE} bytes is no sample")
                if not line.isspace():
                    yield f"{file}:{number}", line
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
