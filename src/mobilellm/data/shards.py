"""Tokens on disk: flat arrays as plain .npy files, memory-mapped, with a manifest that describes and protects them.

    DATA/
      manifest.json
      tokenizer/tokenizer.json ...
      train/wiki-00000.npy           flat 1-D tokens: uint16 up to 65,536 tokens, else uint32
      train/wiki-00000.ends.npy      uint64: the position just after each document's last token
      heldout/wiki-00000.npy ...

    data = TokenFolder.open(Path("DATA"), verify=True)
    data.tokens("train").read(1000, 257)      # 257 tokens, across shard borders where need be
    data.tokens("train").ends()               # where its documents end

A document does not span shards: one that is longer than a shard may be has a shard of its own. Sequence length is chosen
when training, not here.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.errors import UserError
from mobilellm.files import check_file, read_json, sha256_file
from mobilellm.tokenizer.tokenizer import Tokenizer

FORMAT, VERSION = "mobilellm-tokens", 1
MEND = "prepare the data again"
HEADER_BYTES = 128  # of every .npy file here
ENDS = np.dtype("<u8")
SHARD_TOKENS = 1 << 27  # 256 MiB of uint16
SPLITS = ("train", "heldout")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type for tokens of this vocabulary: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


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
        self.folder, self.split, self.source, self.dtype, self.limit = (
            folder,
            split,
            source,
            dtype,
            shard_tokens,
        )
        self.shards: list[dict[str, Any]] = []
        self.file: Any = None
        self.tokens = self.bytes = 0
        self.ends: list[int] = []

    def add(
        self, tokens: NDArray[Any] | list[int], text_bytes: int, ends: NDArray[Any] | None = None
    ) -> None:
        """Append one document, or several that end at `ends` within `tokens`; a shard that they would overfill is closed first."""
        before = self.open_for(len(tokens))
        self.extend(tokens)
        self.bytes += text_bytes
        self.ends.extend((ends + before).tolist() if ends is not None else (self.tokens,))

    def open_for(self, count: int) -> int:
        """Make sure that a shard is open, another one if `count` tokens would overfill it; returns the tokens in it."""
        if self.file is not None and self.tokens + count > self.limit:
            self.close()
        if self.file is None:
            (self.folder / self.split).mkdir(exist_ok=True)
            self.path = self.folder / self.split / f"{self.source}-{len(self.shards):05d}.npy"
            self.file = open(self.path, "wb")  # noqa: SIM115  (closed in `close`)
            self.file.write(self._header(0))
        return self.tokens

    def extend(self, tokens: NDArray[Any] | list[int]) -> None:
        """Append a piece of a document, which `end` ends."""
        self.file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.tokens += len(tokens)

    def end(self, text_bytes: int) -> None:
        """The document whose pieces were appended ends here."""
        self.bytes += text_bytes
        self.ends.append(self.tokens)

    def _header(self, count: int) -> bytes:
        """A version 1.0 .npy header of fixed length: the count is known, and filled in, only at the end."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
        return (
            b"\x93NUMPY\x01\x00"
            + (HEADER_BYTES - 10).to_bytes(2, "little")
            + text.ljust(HEADER_BYTES - 11).encode()
            + b"\n"
        )

    def close(self) -> list[dict[str, Any]]:
        """Finish the shard in hand; returns the manifest entries of all of them."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(self._header(self.tokens))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            ends = self.path.with_suffix(".ends.npy")
            np.save(ends, np.asarray(self.ends, dtype=ENDS))
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
    """SHA-256 over what decides the training data: tokenizer, sources, tokens in order, policies; not file names or paths."""
    content = {
        "tokenizer": manifest["tokenizer"]["sha256"],
        "dtype": manifest["dtype"],
        "shards": {
            split: [
                [s["source"], s["tokens"], s["sha256"]] for s in manifest["splits"][split]["shards"]
            ]
            for split in SPLITS
        },
        **{key: manifest[key] for key in ("bos", "eos", "bos_id", "eos_id")},
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


class TokenStream:
    """Arrays laid end to end, read by position without loading them; each is opened when it is first read."""

    def __init__(
        self,
        lengths: Iterable[int],
        opener: Callable[[int], tuple[NDArray[Any], NDArray[Any]]],
        row: int = 0,
    ) -> None:
        """`opener(i)` gives part i: its tokens (1-D, `lengths[i]` of them) and where documents end within it.

        With `row`, the stream is rows of that many tokens, and a sample is taken from within one row.
        """
        self.starts = np.concatenate(([0], np.cumsum(np.fromiter(lengths, dtype=np.int64)))).astype(
            np.int64
        )
        """Position of each part's first token, and the total."""
        self.row = row
        self._bounds: list[int] = self.starts.tolist()
        self._opener = opener
        self._open: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}

    @classmethod
    def of(
        cls, parts: Iterable[NDArray[Any]], ends: Iterable[NDArray[Any]] = (), row: int = 0
    ) -> TokenStream:
        """A stream over these arrays, with the ends of the documents in each where they are known."""
        parts, known = list(parts), list(ends)
        none = np.empty(0, dtype=ENDS)
        return cls([len(p) for p in parts], lambda i: (parts[i], known[i] if known else none), row)

    def __len__(self) -> int:
        return self._bounds[-1]

    @property
    def parts(self) -> list[NDArray[Any]]:
        """The arrays, all opened."""
        return [self._opener(i)[0] for i in range(len(self._bounds) - 1)]

    def _part(self, i: int) -> tuple[NDArray[Any], NDArray[Any]]:
        part = self._open.get(i)
        if part is None:
            # As plain arrays over the same mapping: slicing an np.memmap costs several times as much.
            tokens, ends = self._opener(i)
            part = self._open[i] = np.asarray(tokens), np.asarray(ends)
        return part

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from position `start`, or fewer at the end of the stream."""
        i = bisect.bisect_right(self._bounds, start) - 1
        if (
            i in self._open and start + count <= self._bounds[i + 1]
        ):  # the common case, which is to cost next to nothing
            return self._open[i][0][start - self._bounds[i] : start - self._bounds[i] + count]
        pieces = [self._part(i)[0][a:b] for i, a, b in self._pieces(start, count)]
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)

    def documents(self, start: int, count: int) -> NDArray[np.int32]:
        """Which document each token that `read` gives belongs to: 0 for the first one's, 1, ...; an EOS belongs to what it ends."""
        steps: list[NDArray[Any]] = []
        for i, a, b in self._pieces(start, count):
            ends = self._part(i)[1]
            first, last = np.searchsorted(ends, (a, b - 1), side="right")
            step = np.bincount(ends[first:last].astype(np.int64) - a, minlength=b - a)
            step[0] += bool(steps)  # no document spans two parts
            steps.append(step)
        return (
            np.cumsum(np.minimum(np.concatenate(steps), 1), dtype=np.int32)
            if steps
            else np.empty(0, dtype=np.int32)
        )

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(part, from, to) of the stretch of `count` tokens from `start`."""
        end = min(start + count, len(self))
        i = bisect.bisect_right(self._bounds, start) - 1
        while start < end:
            base, stop = self._bounds[i], min(end, self._bounds[i + 1])
            if stop > start:
                yield i, start - base, stop - base
            start, i = stop, i + 1

    def document_lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document, (documents,), a part of the stream at a time."""
        for i in range(len(self._bounds) - 1):
            ends = self._part(i)[1].astype(np.int64)
            yield ends - np.concatenate(([0], ends[:-1]))

    def some_documents(
        self, count: int, choose: Callable[[int], NDArray[np.int64]]
    ) -> list[tuple[int, int]]:
        """(start, end) of up to `count` documents; `choose(n)` names some of the n that there are, by number."""
        ends_before = np.cumsum([0, *(len(self._part(i)[1]) for i in range(len(self._bounds) - 1))])
        total = int(ends_before[-1])
        found = []
        for number in sorted(choose(total).tolist())[:count] if total else []:
            i = int(np.searchsorted(ends_before, number, side="right")) - 1
            ends, local = self._part(i)[1], number - int(ends_before[i])
            begin = int(ends[local - 1]) if local else 0
            found.append((self._bounds[i] + begin, self._bounds[i] + int(ends[local])))
        return found

    def ends(self) -> NDArray[np.int64]:
        """The position just after each document's last token, ascending, (documents,): 8 bytes each, in memory."""
        pieces = [
            self._part(i)[1].astype(np.int64) + start for i, start in enumerate(self._bounds[:-1])
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


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
        """Open, checking every file's size and header, and with `verify` its checksum too (about 1 GB/s).

        `UserError` when something is missing, damaged, or of a version this code does not read.
        """
        if not path.is_dir():
            raise UserError(
                f"{path}: no such data folder", hint="make one with `mobilellm prepare`"
            )
        manifest = read_json(path / "manifest.json")
        check_manifest(manifest, path / "manifest.json")
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                file = path / shard["file"]
                dtype = np.dtype(manifest["dtype"])
                for name, size, sha256, kind, count in (
                    (file, shard["size"], shard["sha256"], dtype, shard["tokens"]),
                    (
                        file.with_suffix(".ends.npy"),
                        shard["ends_size"],
                        shard["ends_sha256"],
                        ENDS,
                        shard["documents"],
                    ),
                ):
                    if verify:
                        check_file(name, size=size, sha256=sha256)
                    elif not name.is_file() or name.stat().st_size != size:
                        check_file(name, size=size, sha256="")
                    check_header(name, kind, count)
        return cls(path, manifest)

    def tokens(self, split: str, source: str | None = None) -> TokenStream:
        """The tokens of a split ("train" or "heldout"), of all sources or one, memory-mapped."""
        dtype = np.dtype(self.manifest["dtype"])
        shards = [
            s for s in self.manifest["splits"][split]["shards"] if source in (None, s["source"])
        ]

        def opener(i: int) -> tuple[NDArray[Any], NDArray[Any]]:
            file = self.path / shards[i]["file"]
            ends = map_shard(
                file.with_suffix(".ends.npy"), ENDS, shards[i]["documents"], scattered=True
            )
            return map_shard(file, dtype, shards[i]["tokens"], scattered=True), ends

        return TokenStream((shard["tokens"] for shard in shards), opener)

    def sources(self) -> list[str]:
        """The names of the sources, in the order in which they were given."""
        return [source["name"] for source in self.manifest["sources"]]

    def weights(self) -> dict[str, float]:
        """Shares to mix the sources by: those given when preparing, else in proportion to their tokens."""
        given = {source["name"]: source.get("weight") for source in self.manifest["sources"]}
        return {
            name: float(len(self.tokens("train", name)) if weight is None else weight)
            for name, weight in given.items()
        }

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
                hint="restore it, or prepare the data again",
            )
        return tokenizer

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data was made with. `UserError` when the one in the folder is another."""
        return self._tokenizer


def check_header(path: Path, dtype: np.dtype[Any], count: int) -> None:
    """`UserError` unless an .npy file's header says what the manifest says: `count` values of `dtype`, 1-D."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    if head[:10] != b"\x93NUMPY\x01\x00v\x00" or head[10:].decode("latin-1").strip() != expected:
        raise UserError(
            f"{path}: not the array of {count} {dtype} values that the manifest describes",
            hint=MEND,
        )


def map_shard(
    path: Path, dtype: np.dtype[Any], count: int, scattered: bool = False
) -> NDArray[Any]:
    """Memory-map a file whose header is as expected; `scattered` is for reading samples here and there."""
    check_header(path, dtype, count)
    if count == 0:
        return np.empty(0, dtype=dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        # Else each sample that is not in memory brings in all that lies around it: 2 ms instead of 0.1 on the machine measured.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return mapped


def check_manifest(manifest: Any, path: Path) -> None:
    """`UserError` unless the manifest has the parts that the code above relies on."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: version {manifest.get('version')!r}, this code reads {VERSION}", hint=MEND
        )
    try:
        fault = _fault(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"a part is missing or of another type ({error!r})"
    if fault:
        raise UserError(f"{path}: damaged or edited: {fault}", hint=MEND)


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
                folder != split
                or not name.endswith(".npy")
                or "/" in name
                or "\\" in name
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
            if (
                shard["size"] != HEADER_BYTES + shard["tokens"] * np.dtype(dtype).itemsize
                or shard["ends_size"] != HEADER_BYTES + shard["documents"] * ENDS.itemsize
            ):
                return f"the sizes of {shard['file']} do not follow from its counts"
        for key in ("documents", "tokens", "bytes"):
            if not _whole(entry[key]) or entry[key] != sum(shard[key] for shard in entry["shards"]):
                return f"the {key} of the {split} split are not the sum of its shards'"
    return (
        "" if manifest["fingerprint"] == fingerprint(manifest) else "its fingerprint is another's"
    )


def _whole(value: Any) -> bool:
    """Whether it is a number that counts (and not true or false, which Python calls numbers too)."""
    return type(value) is int and value >= 0
