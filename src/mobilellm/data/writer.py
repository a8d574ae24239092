"""Writes tokens as shards, with what lies beside them, in constant memory.

    writer = ShardWriter(folder, "train", "wiki", np.dtype("<u2"))
    writer.add(ids, text_bytes=5120)
    writer.add(ids, text_bytes=700, trained=bits)    # a conversation: only the answers are learnt
    entries = writer.close()

A document does not span shards: one that is longer than a shard may be has a shard of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.manifest import ShardEntry
from mobilellm.data.shard_file import ENDS, MASK, ends_file, header, mask_file
from mobilellm.files import sha256_file

SHARD_TOKENS = 1 << 27  # 256 MiB of uint16

Bits = Sequence[bool] | NDArray[np.bool_]


class MaskBits:
    """A bit a token, packed as they come."""

    def __init__(self, tokens: int) -> None:
        """The first `tokens` are all trained on."""
        self.packed = bytearray(b"\xff" * (tokens // 8))
        self.rest: NDArray[np.bool_] = np.ones(tokens % 8, dtype=bool)

    def extend(self, trained: NDArray[np.bool_]) -> None:
        """Append a bit for each further token."""
        bits = np.concatenate((self.rest, trained))
        whole = len(bits) // 8 * 8
        self.packed += np.packbits(bits[:whole]).tobytes()
        self.rest = bits[whole:]

    def array(self) -> NDArray[np.uint8]:
        """All bits, the last byte filled up with zeros."""
        packed = np.frombuffer(bytes(self.packed), dtype=MASK)
        return np.concatenate((packed, np.packbits(self.rest))).astype(MASK)


class ShardWriter:
    """Writes one source of one split, shard after shard, in constant memory."""

    def __init__(
        self,
        folder: Path,
        split: str,
        source: str,
        dtype: np.dtype[Any],
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.folder, self.split, self.source = folder, split, source
        self.dtype, self.limit = dtype, shard_tokens
        self.shards: list[ShardEntry] = []
        self.path = folder
        """Of the open shard."""
        self.file: Any = None
        self.parked = False
        """Whether that one's file is closed for now."""
        self.tokens = self.bytes = 0
        self.ends: list[int] = []
        self.mask: MaskBits | None = None
        """Of the open shard, once some of its tokens are not trained on."""

    def add(
        self,
        tokens: NDArray[Any] | list[int],
        text_bytes: int,
        ends: NDArray[Any] | None = None,
        trained: Bits | None = None,
    ) -> None:
        """Append one document, or several that end at `ends` within `tokens`; a shard that they
        would overfill is closed first. `trained` says of each token whether it is trained on;
        without it all are."""
        before = self.open_for(len(tokens))
        self.extend(tokens, trained)
        self.bytes += text_bytes
        self.ends.extend((ends + before).tolist() if ends is not None else (self.tokens,))

    def open_for(self, count: int) -> int:
        """Make sure that a shard is open, another one if `count` tokens would overfill it; returns
        the tokens in it."""
        if self.file is not None and self.tokens + count > self.limit:
            self.close()
        if self.file is None:
            (self.folder / self.split).mkdir(exist_ok=True)
            self.path = self.folder / self.split / f"{self.source}-{len(self.shards):05d}.npy"
            self.file = open(self.path, "wb")  # noqa: SIM115  (closed in `close`)
            self.file.write(header(self.dtype, 0))
        return self.tokens

    def park(self) -> None:
        """Close the file of the open shard for now: what is added next opens it again. For writers
        of more sources than a process may have files open."""
        if self.file is not None and not self.parked:
            self.file.close()
            self.parked = True

    def _again(self) -> None:
        if self.parked:
            self.parked = False
            self.file = open(self.path, "r+b")  # noqa: SIM115  (closed in `close`)
            self.file.seek(0, os.SEEK_END)

    def extend(self, tokens: NDArray[Any] | list[int], trained: Bits | None = None) -> None:
        """Append a piece of a document, which `end` ends. `ValueError` unless `trained` has a bit
        for each token."""
        if trained is not None:
            bits = np.asarray(trained, dtype=bool)
            if bits.shape != (len(tokens),):
                raise ValueError(f"{bits.shape} bits for {len(tokens)} tokens")
            if self.mask is None and not bits.all():
                self.mask = MaskBits(self.tokens)
        if self.mask is not None:
            all_of_them = np.ones(len(tokens), dtype=bool)
            self.mask.extend(all_of_them if trained is None else bits)
        self._again()
        self.file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.tokens += len(tokens)

    def end(self, text_bytes: int) -> None:
        """The document whose pieces were appended ends here."""
        self.bytes += text_bytes
        self.ends.append(self.tokens)

    def discard(self) -> None:
        """Remove the open shard, and what it holds."""
        if self.file is not None:
            self.file.close()
            self.path.unlink()
        self.file, self.tokens, self.bytes, self.ends, self.mask = None, 0, 0, [], None

    def close(self) -> list[ShardEntry]:
        """Finish the open shard; returns the manifest entries of all of them."""
        if self.file is None:
            return self.shards
        self._again()
        self.file.seek(0)
        self.file.write(header(self.dtype, self.tokens))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        ends = ends_file(self.path)
        np.save(ends, np.asarray(self.ends, dtype=ENDS))
        entry: ShardEntry = {
            "file": f"{self.split}/{self.path.name}",
            "source": self.source,
            "tokens": self.tokens,
            "documents": len(self.ends),
            "bytes": self.bytes,
            "size": self.path.stat().st_size,
            "sha256": sha256_file(self.path),
            "ends_size": ends.stat().st_size,
            "ends_sha256": sha256_file(ends),
        }
        if self.mask is not None:
            mask = mask_file(self.path)
            np.save(mask, self.mask.array())
            entry["mask_size"] = mask.stat().st_size
            entry["mask_sha256"] = sha256_file(mask)
        self.shards.append(entry)
        self.file, self.tokens, self.bytes, self.ends, self.mask = None, 0, 0, [], None
        return self.shards
