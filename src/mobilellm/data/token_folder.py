"""Tokens on disk: flat arrays as plain .npy files, memory-mapped, with a manifest that describes
and protects them.

    DATA/
      manifest.json
      tokenizer/tokenizer.json ...
      train/wiki-00000.npy           flat 1-D tokens: uint16 up to 65,536 tokens, else uint32
      train/wiki-00000.ends.npy      uint64: the position just after each document's last token
      train/wiki-00000.mask.npy      a bit a token, where some are not trained on
      held_out/wiki-00000.npy ...

    data = TokenFolder.open(Path("DATA"), verify=True)
    data.tokens("train").read(1000, 257)

Sequence length is chosen when training, not here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.data.manifest import SPLITS, Manifest, ShardEntry, read_manifest
from mobilellm.data.shard_file import (
    ENDS,
    MASK,
    check_header,
    ends_file,
    map_shard,
    mask_bytes,
    mask_file,
)
from mobilellm.data.stream import Part, TokenStream
from mobilellm.errors import UserError
from mobilellm.files import check_file
from mobilellm.tokenizer.tokenizer import Tokenizer


def shard_files(
    folder: Path, shard: ShardEntry, dtype: np.dtype[Any]
) -> Iterator[tuple[Path, int, str, np.dtype[Any], int]]:
    """(file, size in bytes, sha256, type, values) of every file of a shard."""
    file = folder / shard["file"]
    yield file, shard["size"], shard["sha256"], dtype, shard["tokens"]
    yield ends_file(file), shard["ends_size"], shard["ends_sha256"], ENDS, shard["documents"]
    if "mask_size" in shard:
        bits = mask_bytes(shard["tokens"])
        yield mask_file(file), shard["mask_size"], shard["mask_sha256"], MASK, bits


def shard_stream(
    folder: Path, shards: Sequence[ShardEntry], dtype: np.dtype[Any], row: int = 0
) -> TokenStream:
    """The tokens of shards, end to end, memory-mapped when they are first read."""

    def opener(i: int) -> Part:
        shard = shards[i]
        file = folder / shard["file"]
        mask = None
        if "mask_size" in shard:
            bits = mask_bytes(shard["tokens"])
            mask = map_shard(mask_file(file), MASK, bits, scattered=True)
        ends = map_shard(ends_file(file), ENDS, shard["documents"], scattered=True)
        return Part(map_shard(file, dtype, shard["tokens"], scattered=True), ends, mask)

    masked = any("mask_size" in shard for shard in shards)
    return TokenStream((shard["tokens"] for shard in shards), opener, row, masked)


class TokenFolder:
    """A folder of tokens, opened: manifest read and checked against the files."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.bos: bool = manifest["bos"]
        self.eos: bool = manifest["eos"]
        self.bos_id: int | None = manifest["bos_id"]
        self.eos_id: int | None = manifest["eos_id"]
        self.fingerprint: str = manifest["fingerprint"]
        self.masked = any("mask_size" in s for s in manifest["splits"]["train"]["shards"])
        """Whether some tokens of the training split are not trained on."""
        self.row: int = manifest.get("row", 0)
        """Tokens of a row, where samples are whole rows; else 0."""
        self.preferences: dict[str, Any] | None = manifest.get("preferences")  # type: ignore[assignment]
        """What there is to know of pairs of answers, where rows hold such."""

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> TokenFolder:
        """Open, checking every file's size and header, and with `verify` its checksum too (about
        1 GB/s).

        `UserError` when something is missing, damaged, or of a version this code does not read.
        """
        if not path.is_dir():
            raise UserError(
                f"{path}: no such data folder", hint="make one with `mobilellm prepare`"
            )
        manifest = read_manifest(path / "manifest.json")
        dtype = np.dtype(manifest["dtype"])
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                for name, size, sha256, kind, count in shard_files(path, shard, dtype):
                    if verify:
                        check_file(name, size=size, sha256=sha256)
                    elif not name.is_file() or name.stat().st_size != size:
                        check_file(name, size=size, sha256="")
                    check_header(name, kind, count)
        return cls(path, manifest)

    @property
    def prefix_id(self) -> int | None:
        """The token put before held-out text: in training the end of the document before it comes
        before every document, where documents end with one."""
        return self.eos_id if self.eos else None

    def tokens(self, split: str, source: str | None = None) -> TokenStream:
        """The tokens of a split ("train" or "held_out"), of all sources or one, memory-mapped."""
        shards = [
            s for s in self.manifest["splits"][split]["shards"] if source in (None, s["source"])
        ]
        return shard_stream(self.path, shards, np.dtype(self.manifest["dtype"]), self.row)

    def sources(self) -> list[str]:
        """The names of the sources, in the order in which they were given."""
        return [source["name"] for source in self.manifest["sources"]]

    def weights(self) -> dict[str, float]:
        """Shares to mix the sources by: those given when preparing, else in proportion to their
        tokens."""
        given = {source["name"]: source.get("weight") for source in self.manifest["sources"]}
        return {
            name: float(len(self.tokens("train", name)) if weight is None else weight)
            for name, weight in given.items()
        }

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text that a split was made from."""
        return int(self.manifest["splits"][split]["bytes"])

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if tokenizer.sha256 != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{self.path / 'tokenizer'}: not the tokenizer this data was made with "
                f"({tokenizer.sha256[:12]} where the manifest says "
                f"{str(self.manifest['tokenizer']['sha256'])[:12]})",
                hint="restore it, or prepare the data again",
            )
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data was made with. `UserError` when the one in the folder is
        another."""
        return self._tokenizer
