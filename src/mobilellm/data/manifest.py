"""The manifest of a token folder: what it holds, and that it holds together.

    manifest = read_manifest(Path("DATA/manifest.json"))
    manifest["splits"]["train"]["shards"][0]["tokens"]

Version 1 called the held-out split "heldout"; it is read under the name of today.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import orjson
from typing_extensions import NotRequired  # Python 3.11 has it in typing

from mobilellm.data.shard_file import ENDS, HEADER_BYTES, PREPARE_AGAIN, mask_bytes, token_dtype
from mobilellm.errors import UserError
from mobilellm.files import plain_name, read_json
from mobilellm.schema import fault_of

FORMAT, VERSION = "mobilellm-tokens", 2
READ_VERSIONS = (1, 2)
SPLITS = ("train", "held_out")
OLD_HELD_OUT = "heldout"  # the split's name, and its folder's, in version 1


class ShardEntry(TypedDict):
    """A shard in the manifest."""

    file: str
    """SPLIT/NAME.npy; the files beside it are named after it."""
    source: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text."""
    size: int
    """Bytes of the file."""
    sha256: str
    ends_size: int
    ends_sha256: str
    mask_size: NotRequired[int]
    """Of the file that says which tokens are trained on; absent where all are."""
    mask_sha256: NotRequired[str]


class SplitEntry(TypedDict):
    """A split in the manifest: sums over its shards, and these."""

    documents: int
    tokens: int
    bytes: int
    shards: list[ShardEntry]


class TokenizerEntry(TypedDict):
    """The tokenizer in the manifest."""

    name: str
    sha256: str
    vocab_size: int


class SourceEntry(TypedDict):
    """A source in the manifest."""

    name: str
    documents: int
    tokens: int
    bytes: int
    files: list[dict[str, Any]]
    """Name, size and sha256 of each file that it was made from."""
    weight: NotRequired[float]
    """Share of the tokens that was asked for when preparing."""


class Manifest(TypedDict):
    """manifest.json of a token folder."""

    format: str
    version: int
    tokenizer: TokenizerEntry
    dtype: str
    bos: bool
    eos: bool
    bos_id: int | None
    eos_id: int | None
    seed: int
    held_out: dict[str, Any]
    """The rule by which documents were held out."""
    sources: list[SourceEntry]
    splits: dict[str, SplitEntry]
    row: NotRequired[int]
    """Tokens of a row, where samples are whole rows."""
    fingerprint: str


def fingerprint(manifest: Manifest) -> str:
    """SHA-256 over what decides the training data: tokenizer, sources, tokens in order,
    policies; not file names or paths."""
    # The split's name of version 1 stays in what is hashed: the same data keep their fingerprint.
    named = {"train": "train", "held_out": OLD_HELD_OUT}
    content: dict[str, Any] = {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "shards": {
            named[split]: [
                [
                    s["source"],
                    s["tokens"],
                    s["sha256"],
                    *([mask] if (mask := s.get("mask_sha256")) else []),
                ]
                for s in manifest["splits"][split]["shards"]
            ]
            for split in SPLITS
        },
        "bos": manifest["bos"],
        "eos": manifest["eos"],
        "bos_id": manifest["bos_id"],
        "eos_id": manifest["eos_id"],
        **({"row": manifest["row"]} if "row" in manifest else {}),
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """A manifest, checked. `UserError` when it is missing, of another format, damaged or edited."""
    manifest = read_json(path)
    check_manifest(manifest, path)
    return cast(Manifest, manifest)


def check_manifest(manifest: Any, path: Path) -> None:
    """`UserError` unless the manifest has the parts that its readers rely on. The held-out split
    of version 1 gets its name of today."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of {FORMAT}")
    if manifest.get("version") not in READ_VERSIONS:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, this code reads "
            f"{' and '.join(map(str, READ_VERSIONS))}",
            hint=PREPARE_AGAIN,
        )
    splits = manifest.get("splits")
    if manifest["version"] == 1 and isinstance(splits, dict) and OLD_HELD_OUT in splits:
        splits["held_out"] = splits.pop(OLD_HELD_OUT)
    fault = fault_of(manifest, Manifest) or _fault(manifest)
    if fault:
        raise UserError(f"{path}: damaged or edited: {fault}", hint=PREPARE_AGAIN)


def _fault(manifest: dict[str, Any]) -> str:
    """What in a manifest contradicts the format or the rest of it, or nothing."""
    vocab_size, dtype = manifest["tokenizer"]["vocab_size"], manifest["dtype"]
    if not _whole(vocab_size) or not 0 < vocab_size <= 1 << 32:
        return f"a vocabulary of {vocab_size!r}"
    if dtype != token_dtype(vocab_size).str:
        return f"tokens of type {dtype!r} for a vocabulary of {vocab_size}"
    for kind in ("bos", "eos"):
        used, token = manifest[kind], manifest[f"{kind}_id"]
        known = _whole(token) and token < vocab_size
        if not isinstance(used, bool) or not (known or (token is None and not used)):
            return f"{kind} is {used!r} with the id {token!r}"
    row = manifest.get("row", 0)
    if not _whole(row) or ("row" in manifest and row < 3):
        return f"rows of {row!r} tokens"
    names = [source["name"] for source in manifest["sources"]]
    for source in manifest["sources"]:
        weight = source.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight < float("inf"):
            return f"the weight of {source['name']!r} is {weight!r}"
    if type(manifest["seed"]) is not int or not isinstance(manifest["held_out"]["rule"], str):
        return f"seed {manifest['seed']!r}, held out {manifest['held_out']!r}"
    for split in SPLITS:
        entry, seen = manifest["splits"][split], set()
        for shard in entry["shards"]:
            # A name and nothing else: a manifest from elsewhere must not lead out of its folder.
            folder, _, name = shard["file"].partition("/")
            if (
                folder not in (split, OLD_HELD_OUT if split == "held_out" else split)
                or not name.endswith(".npy")
                or "/" in name
                or not plain_name(name)
                or name in seen
            ):
                return f"a shard named {shard['file']!r}"
            seen.add(name)
            if shard["source"] not in names:
                return f"{shard['file']} is of a source {shard['source']!r} that is not listed"
            if not all(
                _whole(shard[key]) for key in ("tokens", "documents", "bytes", "size", "ends_size")
            ):
                return f"{shard['file']} has a count that is not a whole number"
            masked = HEADER_BYTES + mask_bytes(shard["tokens"])
            if (
                shard["size"] != HEADER_BYTES + shard["tokens"] * np.dtype(dtype).itemsize
                or shard["ends_size"] != HEADER_BYTES + shard["documents"] * ENDS.itemsize
                or shard.get("mask_size", masked) != masked
            ):
                return f"the sizes of {shard['file']} do not follow from its counts"
            if row and shard["tokens"] % row:
                return f"{shard['file']} does not divide into rows of {row} tokens"
            if ("mask_size" in shard) != isinstance(shard.get("mask_sha256"), str):
                return f"{shard['file']} has half a mask"
        for key in ("documents", "tokens", "bytes"):
            if not _whole(entry[key]) or entry[key] != sum(shard[key] for shard in entry["shards"]):
                return f"the {key} of the {split} split are not the sum of its shards'"
    return (
        ""
        if manifest["fingerprint"] == fingerprint(cast(Manifest, manifest))
        else "its fingerprint is another's"
    )


def _whole(value: Any) -> bool:
    """Whether it is a number that counts (and not true or false, which Python calls numbers
    too)."""
    return type(value) is int and value >= 0
