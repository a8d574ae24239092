"""Tokens on disk: flat arrays as plain .npy files, memory-mapped, with a manifest that describes and protects them.

    DATA/
      manifest.json
      tokenizer/tokenizer.json ...
      train/wiki-00000.npy           flat 1-D tokens: uint16 up to 65,536 tokens, else uint32
      train/wiki-00000.ends.npy      uint64: the position just after each document's last token
      heldout/wiki-00000.npy ...

    data = TokenFolder.open(Path("DATA"), verify=True)
    data.tokens("train").read(1000, 257)      # 257 tokens, across shard borders where need be

A document does not span shards. Sequence length is chosen when training, not here.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.data.tokenizer import Tokenizer
from mobilellm.errors import UserError
from mobilellm.files import check_file, read_json, sha256_file

FORMAT, VERSION = "mobilellm-tokens", 1
SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
SPLITS = ("train", "heldout")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type for tokens of this vocabulary: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes one source of one split, shard after shard, in constant memory."""

    def __init__(self, folder: Path, split: str, source: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.source, self.dtype, self.limit = folder, split, source, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.file: Any = None
        self.tokens = self.bytes = 0
        self.ends: list[int] = []

    def add(self, tokens: NDArray[Any] | list[int], text_bytes: int) -> None:
        """Append one document; a shard that it would overfill is closed first."""
        if self.file is not None and self.tokens + len(tokens) > self.limit:
            self.close()
        if self.file is None:
            (self.folder / self.split).mkdir(exist_ok=True)
            self.path = self.folder / self.split / f"{self.source}-{len(self.shards):05d}.npy"
            self.file = open(self.path, "wb")  # noqa: SIM115  (closed in `close`)
            self.file.write(self._header(0))
        self.file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.tokens += len(tokens)
        self.bytes += text_bytes
        self.ends.append(self.tokens)

    def _header(self, count: int) -> bytes:
        """A version 1.0 .npy header of fixed length: the count is known, and filled in, only at the end."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"

    def close(self) -> list[dict[str, Any]]:
        """Finish the shard in hand; returns the manifest entries of all of them."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(self._header(self.tokens))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            ends = self.path.with_suffix(".ends.npy")
            np.save(ends, np.asarray(self.ends, dtype="<u8"))
            self.shards.append(
                {
                    "file": f"{self.split}/{self.path.name}", "source": self.source, "tokens": self.tokens,
                    "documents": len(self.ends), "bytes": self.bytes, "size": self.path.stat().st_size,
                    "sha256": sha256_file(self.path), "ends_size": ends.stat().st_size, "ends_sha256": sha256_file(ends),
                }
            )  # fmt: skip
            self.file, self.tokens, self.bytes, self.ends = None, 0, 0, []
        return self.shards


def fingerprint(manifest: dict[str, Any]) -> str:
    """SHA-256 over what decides the training data: tokenizer, tokens in order, policies; not names or paths."""
    content = {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "shards": {
            split: [[s["source"], s["tokens"], s["sha256"]] for s in manifest["splits"][split]["shards"]] for split in SPLITS
        },
        **{key: manifest[key] for key in ("bos", "eos", "bos_id", "eos_id")},
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


@dataclass(frozen=True)
class TokenStream:
    """Shards laid end to end, read by position without loading them."""

    parts: list[NDArray[Any]]
    """The shards, memory-mapped, 1-D."""
    starts: NDArray[np.int64]
    """Position of each shard's first token, and the total."""

    @classmethod
    def of(cls, parts: Iterable[NDArray[Any]]) -> TokenStream:
        """A stream over these arrays."""
        parts = list(parts)
        return cls(parts, np.concatenate(([0], np.cumsum([len(p) for p in parts], dtype=np.int64))).astype(np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from position `start`, or fewer at the end of the stream."""
        end = min(start + count, len(self))
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        while start < end:
            offset = start - int(self.starts[shard])
            piece = self.parts[shard][offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
            shard += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)


class TokenFolder:
    """A folder of tokens, opened: manifest read and checked against the files."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.bos: bool = manifest["bos"]
        self.eos: bool = manifest["eos"]
        self.bos_id: int | None = manifest["bos_id"]
        self.eos_id: int | None = manifest["eos_id"]
        self.fingerprint: str = manifest["fingerprint"]

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> TokenFolder:
        """Open, checking every file's size, and with `verify` its checksum too (about 1 GB/s).

        `UserError` when something is missing, damaged, or of a version this code does not read.
        """
        if not path.is_dir():
            raise UserError(f"{path}: no such data folder", mend="make one with `mobilellm prepare`")
        manifest = read_json(path / "manifest.json")
        _check_manifest(manifest, path / "manifest.json")
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                file = path / shard["file"]
                for name, size, sha256 in (
                    (file, shard["size"], shard["sha256"]),
                    (file.with_suffix(".ends.npy"), shard["ends_size"], shard["ends_sha256"]),
                ):
                    if verify:
                        check_file(name, size=size, sha256=sha256)
                    elif not name.is_file() or name.stat().st_size != size:
                        check_file(name, size=size, sha256="")
        return cls(path, manifest)

    def tokens(self, split: str, source: str | None = None) -> TokenStream:
        """The tokens of a split ("train" or "heldout"), of all sources or one, memory-mapped."""
        dtype = np.dtype(self.manifest["dtype"])
        return TokenStream.of(
            _map(self.path / shard["file"], dtype, shard["tokens"])
            for shard in self.manifest["splits"][split]["shards"]
            if source in (None, shard["source"])
        )

    def text_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text behind a split."""
        return int(self.manifest["splits"][split]["bytes"])

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path / "tokenizer")
        if tokenizer.sha256 != self.manifest["tokenizer"]["sha256"]:
            raise UserError(
                f"{self.path / 'tokenizer'}: not the tokenizer this data was made with "
                f"({tokenizer.sha256[:12]} where the manifest says {str(self.manifest['tokenizer']['sha256'])[:12]})",
                mend="restore it, or prepare the data again",
            )
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data was made with. `UserError` when the one in the folder is another."""
        return self._tokenizer


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Memory-map a shard whose header says what the manifest says."""
    with open(path, "rb") as file:
        head = file.read(10)
        length = int.from_bytes(head[8:10], "little")
        text = file.read(length).decode("latin-1")
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    if head[:8] != b"\x93NUMPY\x01\x00" or text.strip() != expected:
        raise UserError(
            f"{path}: not the array of {count} {dtype} tokens that the manifest describes", mend="prepare the data again"
        )
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=10 + length, shape=(count,))


def _check_manifest(manifest: Any, path: Path) -> None:
    """`UserError` unless the manifest has the parts that the code above relies on."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: version {manifest.get('version')!r}, this code reads {VERSION}", mend="prepare the data again")
    try:
        vocab_size, dtype = manifest["tokenizer"]["vocab_size"], manifest["dtype"]
        assert isinstance(vocab_size, int)
        assert 0 < vocab_size <= 1 << 32
        assert dtype == token_dtype(vocab_size).str
        assert isinstance(manifest["tokenizer"]["sha256"], str)
        for split in SPLITS:
            entry = manifest["splits"][split]
            assert all(isinstance(entry[key], int) for key in ("documents", "tokens", "bytes"))
            for shard in entry["shards"]:
                name = Path(shard["file"])
                assert not name.is_absolute()
                assert ".." not in name.parts
                assert all(
                    isinstance(shard[key], int) and shard[key] >= 0 for key in ("tokens", "documents", "bytes", "size", "ends_size")
                )
                assert shard["size"] == 128 + shard["tokens"] * np.dtype(dtype).itemsize
            assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])
        assert manifest["fingerprint"] == fingerprint(manifest)
    except (KeyError, TypeError, ValueError, AssertionError):
        raise UserError(f"{path}: damaged or edited: its parts contradict each other", mend="prepare the data again") from None
