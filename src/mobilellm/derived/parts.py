"""Arrays that take long to compute, as a folder: part by part, resumed where it was stopped.

    folder = make(out, facts, parts, compute)      # OUT appears when all of it is there
    opened = Folder.open(out)                      # sizes and checksums compared
    opened.array("train-00000.ids.npy")

`facts` say what the arrays were computed from. While it is made the folder is OUT.making; parts in
it are taken over by the next start if the facts are the same, and removed otherwise. The manifest
has the checksum of each file and of itself, so that one that is cut or changed is refused.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from mobilellm.data.shard_file import HEADER_BYTES, check_header, header, map_shard
from mobilellm.errors import UserError
from mobilellm.files import (
    check_absent,
    check_file,
    disk_errors,
    locked,
    publish,
    read_json,
    sha256_file,
    sweep_partial,
    write_file,
    write_json,
)
from mobilellm.model.network import Network

FORMAT, VERSION = "mobilellm-derived", 1
MAKE_AGAIN = "remove it, and it is made again"


@dataclass(frozen=True)
class ArrayFile:
    """A flat array of a part."""

    name: str
    dtype: np.dtype[Any]
    count: int
    """Values."""

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + self.count * self.dtype.itemsize


Part = Sequence[ArrayFile]
Compute = Callable[[int], Sequence[NDArray[Any]]]


def make(
    out: Path,
    facts: Mapping[str, Any],
    parts: Sequence[Part],
    compute: Compute,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Path:
    """Make the folder `out`; `compute(i)` gives the arrays of part i, in the order of its files.

    `UserError` when `out` exists, or another process makes it.
    """
    check_absent(out)
    work = out.with_name(f"{out.name}.making")
    hint = "wait for it, or choose another name"
    lock = work.with_name(f".{work.name}.lock")
    with disk_errors(out), locked(lock, out, "is making it", hint=hint):
        if (work / "facts.json").is_file() and read_json(work / "facts.json") != dict(facts):
            shutil.rmtree(work)  # parts of something else
        work.mkdir(parents=True, exist_ok=True)
        sweep_partial(work)
        if not (work / "facts.json").is_file():
            write_json(work / "facts.json", facts)
        for number, files in enumerate(parts):
            progress(number, len(parts))
            if all(_complete(work, file) for file in files):
                continue
            for file, array in zip(files, compute(number), strict=True):
                _write(work / file.name, array, file)
        progress(len(parts), len(parts))
        listed = [
            {
                "name": file.name,
                "dtype": file.dtype.str,
                "count": file.count,
                "sha256": sha256_file(work / file.name),
            }
            for files in parts
            for file in files
        ]
        manifest = {"format": FORMAT, "version": VERSION, "facts": dict(facts), "files": listed}
        write_json(work / "manifest.json", manifest | {"sha256": digest_of(manifest)})
        (work / "facts.json").unlink()
        publish(work, out)
    lock.unlink(missing_ok=True)
    return out


class Folder:
    """A folder of arrays, opened."""

    def __init__(self, path: Path, facts: dict[str, Any], files: dict[str, ArrayFile]) -> None:
        self.path, self.facts, self.files = path, facts, files

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Open, comparing every file's size and checksum. `UserError` for what is missing or
        damaged."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        manifest = read_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{path}: not a folder of {FORMAT}")
        if manifest.get("version") != VERSION:
            raise UserError(
                f"{path}: version {manifest.get('version')!r}, this code reads {VERSION}",
                hint=MAKE_AGAIN,
            )
        own = manifest.pop("sha256", None)
        if own != digest_of(manifest):
            raise UserError(f"{path / 'manifest.json'}: damaged or edited", hint=MAKE_AGAIN)
        files = {}
        for entry in manifest["files"]:
            file = ArrayFile(entry["name"], np.dtype(entry["dtype"]), entry["count"])
            check_file(path / file.name, size=file.size, sha256=entry["sha256"])
            check_header(path / file.name, file.dtype, file.count)
            files[file.name] = file
        return cls(path, manifest["facts"], files)

    def array(self, name: str) -> NDArray[Any]:
        """A file's array, flat, memory-mapped."""
        file = self.files[name]
        return map_shard(self.path / name, file.dtype, file.count, scattered=True)

    def check(self, wanted: Mapping[str, Any], hint: str) -> None:
        """`UserError` that names the first of the `wanted` facts which is another here."""
        for key, value in wanted.items():
            found = self.facts.get(key)
            if found != value:
                mine, theirs = (f"{v:.12}" if isinstance(v, str) else v for v in (found, value))
                name = key.replace("_", " ")
                raise UserError(f"{self.path}: made for {name} {mine}, not {theirs}", hint=hint)


def network_sha256(network: Network) -> str:
    """SHA-256 over all weights in float32 with their names, and over the order in which blocks are
    applied where it is not theirs: the same for a model in any format."""
    digest = hashlib.sha256()
    order = network.config.applications
    if len(order) != network.config.num_hidden_layers:
        digest.update(f"{[tuple(one) for one in order]}\n".encode())
    for name, parameter in sorted(network.named_parameters()):
        tensor = parameter.detach().to("cpu", torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().numpy().data)
    return digest.hexdigest()


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of what can be JSON, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _complete(folder: Path, file: ArrayFile) -> bool:
    """Whether a file of an earlier start is there: it was renamed into place when it was whole."""
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _write(path: Path, array: NDArray[Any], file: ArrayFile) -> None:
    if array.size != file.count:
        raise ValueError(f"{file.name}: {array.size} values, not {file.count}")
    data = io.BytesIO()
    data.write(header(file.dtype, file.count))
    data.write(np.ascontiguousarray(array, dtype=file.dtype).tobytes())
    write_file(path, data.getvalue())
