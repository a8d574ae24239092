"""Text to a token folder: read, split, tokenise, write.

    prepare([Source("book", [Path("book.txt")])], Path("data/book"), vocab_size=2048)

Held out are documents, chosen by a hash of (seed, source, number), or the tail of a text that is a single document.
A tokenizer that is trained here never sees held-out text. The files are read two or three times, as streams: to see which
documents there are, to train the tokenizer where none is given, and to write.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mobilellm.data.documents import Source, documents
from mobilellm.data.order import derive_key
from mobilellm.data.shards import FORMAT, SPLITS, VERSION, ShardWriter, fingerprint, token_dtype
from mobilellm.data.tokenizer import Tokenizer, train_bpe
from mobilellm.errors import UserError
from mobilellm.files import new_folder, sha256_file, write_json

Progress = Callable[[float, float], None]
BATCH_CHARACTERS = 1 << 20  # of text tokenised at once


def parse_sources(arguments: Sequence[str]) -> list[Source]:
    """Sources from "PATH" and "NAME=PATH" arguments; a bare path is named after its file, and equal names join."""
    found: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+", name):
            path = argument
            name = re.sub(r"[^\w-]+", "_", Path(path).name.split(".")[0]) or "text"
        found.setdefault(name, []).append(Path(path))
    if not found:
        raise UserError("no text given", mend="name files or folders")
    return [Source(name, paths) for name, paths in found.items()]


def made_from(manifest: dict[str, Any], sources: list[Source]) -> bool:
    """Whether prepared data was made from just these files, by their content."""
    recorded = [file["sha256"] for source in manifest["sources"] for file in source["files"]]
    return recorded == [sha256_file(path) for source in sources for path in source.files()]


class Split:
    """Which documents are held out. A single document is cut: its tail is held out."""

    def __init__(
        self, sources: list[Source], fraction: float, seed: int, text_field: str, progress: Callable[[int], None]
    ) -> None:  # fmt: skip
        """Reads all sources once; `progress` is told the bytes of the files read so far."""
        if not 0 < fraction < 1:
            raise UserError(f"held out {fraction}: must be a fraction above 0 and below 1")
        self.fraction, self.seed = fraction, seed
        first: list[tuple[str, int]] = []  # the first documents that are not empty, as (source, number)
        total, fewest = 0, (1.0, ("", 0))
        any_held_out = any_trained = False
        before = 0
        for source in sources:
            number = 0
            for path in source.files():
                for text, position in documents(path, text_field):
                    progress(before + position)
                    if text:
                        total += 1
                        draw = self._draw(source.name, number)
                        fewest = min(fewest, (draw, (source.name, number)))
                        any_held_out, any_trained = any_held_out or draw < fraction, any_trained or draw >= fraction
                        if len(first) < 2:
                            first.append((source.name, number))
                            self.place = path  # of the only document, if there is but one
                    number += 1
                before += path.stat().st_size
        if not total:
            raise UserError(f"{sources[0].paths[0]}: no text in it" + (" or the other sources" if len(sources) > 1 else ""))
        self.rule = "tail" if total == 1 else "documents"
        # With few documents chance may leave a side empty: then the lowest draw, or all but it, is moved.
        self.forced_out = None if any_held_out else fewest[1]
        self.forced_in = None if any_trained else next(f for f in first if f != fewest[1]) if total > 1 else None

    def _draw(self, source: str, number: int) -> float:
        return derive_key(self.seed, source, number) / 2.0**64

    def parts(self, source: str, number: int, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) of a document: itself, or its two parts."""
        if self.rule == "tail":
            cut = int(len(text) * (1 - self.fraction))
            if not 0 < cut < len(text):
                raise UserError(
                    f"{self.place}: a text of {len(text)} characters is too short to hold out {self.fraction:g} of it",
                    mend="give more text, or hold out another fraction",
                )
            yield "train", text[:cut]
            yield "heldout", text[cut:]
            return
        held_out = self._draw(source, number) < self.fraction
        if (source, number) == self.forced_out:
            held_out = True
        elif (source, number) == self.forced_in:
            held_out = False
        yield "heldout" if held_out else "train", text


def check_names(sources: list[Source]) -> None:
    """`UserError` unless there are sources, and their names, which become file names, are plain and differ."""
    names = [source.name for source in sources]
    if not names:
        raise UserError("no text given", mend="name files or folders")
    for name in names:
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"a source named {name!r}", mend='use letters, digits, "-" and "_"')
        if names.count(name) > 1:
            raise UserError(f"two sources named {name!r}", mend="put their files into one source, or rename one")


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file that was read."""
    return {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def prepare(
    sources: list[Source], out: Path, *, tokenizer: Tokenizer | None = None, vocab_size: int = 4096, held_out: float = 0.01,
    seed: int = 0, bos: bool = False, eos: bool = True, text_field: str = "text", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the token folder `out` and return its manifest. Nothing is left of it when this raises.

    Without a `tokenizer`, one of `vocab_size` is trained on the training split. `progress(done, total)` counts bytes of the
    files, over every pass made. `UserError` for any fault in the text, naming file and line, and when `out` exists.
    """
    check_names(sources)
    with new_folder(out) as staging:
        total = sum(path.stat().st_size for source in sources for path in source.files())
        passes = 2 if tokenizer else 3

        def report(done: int) -> None:
            if progress:
                progress(done, passes * total)

        split = Split(sources, held_out, seed, text_field, report)
        counts = {source.name: {"documents": 0, "tokens": 0, "bytes": 0, "documents_skipped": 0} for source in sources}

        def parts(shown: int) -> Iterator[tuple[str, str, str]]:
            """(source, split, text) of every document, reporting progress for pass number `shown`."""
            before = shown * total
            for source in sources:
                number = 0
                for path in source.files():
                    for text, position in documents(path, text_field):
                        for part, piece in split.parts(source.name, number, text) if text else ():
                            yield source.name, part, piece
                        if not text and shown == passes - 1:
                            counts[source.name]["documents_skipped"] += 1
                        number += 1
                        report(before + position)
                    before += path.stat().st_size

        if tokenizer is None:
            tokenizer = train_bpe((text for _, part, text in parts(1) if part == "train"), vocab_size)
        if bos and tokenizer.bos_id is None:
            raise UserError("a BOS token is asked for, but the tokenizer has none", mend="leave out --bos")
        if eos and tokenizer.eos_id is None:
            raise UserError("an EOS token is asked for, but the tokenizer has none", mend="add --no-eos")
        dtype = token_dtype(tokenizer.vocab_size)
        writers = {(s.name, part): ShardWriter(staging, part, s.name, dtype) for s in sources for part in SPLITS}
        opening = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
        closing = [tokenizer.eos_id] if eos and tokenizer.eos_id is not None else []

        def write(batch: list[tuple[str, str, str]]) -> None:
            assert tokenizer is not None
            for (source, part, text), ids in zip(batch, tokenizer.encode_batch([t for _, _, t in batch]), strict=True):
                size = len(text.encode())
                tokens = [*opening, *ids, *closing]
                writers[source, part].add(tokens, size)
                counts[source]["documents"] += 1
                counts[source]["tokens"] += len(tokens)
                counts[source]["bytes"] += size

        batch: list[tuple[str, str, str]] = []
        characters = 0
        for document in parts(passes - 1):
            batch.append(document)
            characters += len(document[2])
            if characters >= BATCH_CHARACTERS:
                write(batch)
                batch, characters = [], 0
        write(batch)
        tokenizer.save(staging / "tokenizer")
        manifest: dict[str, Any] = {
            "format": FORMAT, "version": VERSION,
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            "dtype": dtype.str, "bos": bos, "eos": eos, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id,
            "held_out": {"rule": split.rule, "fraction": held_out}, "seed": seed,
            "sources": [
                {"name": source.name, **counts[source.name], "files": [describe(p) for p in source.files()]} for source in sources
            ],
            "splits": {},
        }  # fmt: skip
        for entry in manifest["sources"]:  # one checksum for all files of a source: over theirs, a line each, in order
            checksums = "".join(f"{file['sha256']}\n" for file in entry["files"])
            entry["sha256"] = hashlib.sha256(checksums.encode()).hexdigest()
        for part in SPLITS:
            shards = [shard for source in sources for shard in writers[source.name, part].close()]
            manifest["splits"][part] = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")} | {
                "shards": shards
            }
        manifest["fingerprint"] = fingerprint(manifest)
        write_json(staging / "manifest.json", manifest)
    return manifest
