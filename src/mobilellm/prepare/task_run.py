"""A task of preparation at work: reads its files, tokenizes, writes shards and counts.

result = tokenize(asdict(task), asdict(job), folder, progress)
# folder/train/*.npy, folder/held_out/*.npy, and what is in them
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.byte_lengths import byte_lengths
from mobilellm.data.layout import UNNAMED, ends_in
from mobilellm.data.manifest import ShardEntry
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.prepare.tasks import Job, Part, Task
from mobilellm.readers.reader import ReadSettings, Record
from mobilellm.readers.table import records
from mobilellm.streams.places import Place, place_of, sha256_of, status_of
from mobilellm.tokenizer.encoder import Encoder, UnbrokenTextError
from mobilellm.tokenizer.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20  # of text tokenized at once
LONG = 1 << 21  # characters above which a document is tokenized in pieces
CHECKED = 1 << 14  # characters of a text that are compared with the reference
MAX_LISTED = 100  # records left out that are named


@dataclass
class Count:
    """What became of the records of one source."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad: int = 0

    def add(self, other: Count) -> None:
        """Add what became of other records."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class TaskShard(ShardEntry):
    """A shard of one task, whose `file` is relative to the task's folder."""

    split: str


@dataclass
class TaskResult:
    """What a task wrote and saw."""

    shards: list[TaskShard] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)
    """By source."""
    skipped: list[list[str]] = field(default_factory=list)
    """(place, reason) of the first records that were left out."""
    verified: int = 0
    """Documents whose ids were compared with the reference."""
    files: list[list[Any]] = field(default_factory=list)
    """(path, bytes, sha256) of the files whose first span is in the task."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TaskResult:
        """What `dataclasses.asdict` gave."""
        counts = {name: Count(**count) for name, count in values["counts"].items()}
        return cls(**{**values, "counts": counts})


@dataclass(frozen=True)
class FinishedTask:
    """A task that is done."""

    folder: Path
    """Its shards are under it."""
    result: TaskResult


class TaskRun:
    """One task in progress."""

    def __init__(
        self, task: Task, job: Job, folder: Path, progress: Callable[[float], None]
    ) -> None:
        self.task, self.job, self.folder, self.progress = task, job, folder, progress
        self.tokenizer, self.encoder = load_encoder(
            job.tokenizer, job.library, job.tokenizer_sha256
        )
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.opening = (
            [self.tokenizer.bos_id] if job.bos and self.tokenizer.bos_id is not None else []
        )
        self.closing = (
            [self.tokenizer.eos_id] if job.eos and self.tokenizer.eos_id is not None else []
        )
        self.read = ReadSettings(
            text_field=job.text_field,
            vocab_size=self.tokenizer.vocab_size,
            sample_lengths=(job.sequence_length, job.sequence_length + 1),
            separator=job.separator,
        )
        self.writers: dict[tuple[str, str], ShardWriter] = {}
        self.batches: dict[str, tuple[list[str], list[int]]] = {
            "train": ([], []),
            "held_out": ([], []),
        }
        self.characters = 0
        self.result = TaskResult(counts={task.source: Count()})

    def run(self) -> TaskResult:
        """Read the task's files, tokenize, write."""
        done = 0.0
        share = self.task.weight / max(1, len(self.task.parts))
        for part in self.task.parts:
            path = place_of(part.path)
            self._unchanged(path, part)
            if part.start == 0:
                try:
                    self.result.files.append([part.path, part.size, sha256_of(path)])
                except OSError as error:
                    if self.job.on_bad == "stop":
                        raise UserError(
                            f"{path}: cannot be read ({error.strerror or error})"
                        ) from None
                    self.result.files.append([part.path, part.size, None])
            for record in records(path, part.span, self.read):
                self.take(record, part)
            self._unchanged(path, part)
            done += share
            self.progress(done)
        return self.finish()

    def finish(self) -> TaskResult:
        """Write what waits, close the shards."""
        self._flush()
        for (source, split), writer in self.writers.items():
            for shard in writer.close():
                self.result.shards.append({**shard, "source": source, "split": split})
        return self.result

    def _unchanged(self, path: Place, part: Part) -> None:
        try:
            status = status_of(path)
        except OSError as error:
            raise UserError(f"{path}: went away while it was read ({error.strerror})") from None
        if (status.size, status.modified) != (part.size, part.modified):
            raise UserError(
                f"{path}: changed while it was read", hint="run again when nothing writes to it"
            )

    def take(self, record: Record, part: Part) -> None:
        """Count a record, and tokenize what is in it.

        `UserError` for a bad one, unless those are skipped.
        """
        name = self.task.source
        if record.ids is not None and not self.task.given and record.source not in (None, UNNAMED):
            name = safe_name(str(record.source))
        count = self.result.counts.setdefault(name, Count())
        count.records += 1
        if record.fault is not None:
            if self.job.on_bad == "stop":
                raise record.fault
            count.bad += 1
            self._skipped(record.where, str(record.fault.what).removeprefix(f"{record.where}: "))
        elif record.text == "":
            count.empty += 1
            self._skipped(record.where or f"{part.path} at {record.key}", "empty")
        elif record.ids is not None:
            self._sample(record.ids, name, part, record.key, count)
        elif self.task.source in self.job.split.tails:
            self._cut_in_two(record, count)
        else:
            held_out, bits = self.job.split.held_out(self.task.source, part.file, record.key)
            split = "held_out" if held_out else "train"
            count.documents += 1
            if record.text is None or len(record.text) > LONG:
                self._flush()
                try:
                    self._long(record.pieces(), split, count)
                except UnbrokenTextError as error:
                    fault = UserError(f"{record.where or part.path}: {error.what}", hint=error.hint)
                    if self.job.on_bad == "stop":
                        raise fault from None
                    self._writer(name, split).discard()
                    count.documents -= 1
                    count.bad += 1
                    self._skipped(record.where or f"{part.path} at {record.key}", error.what)
            else:
                texts, draws = self.batches[split]
                texts.append(record.text)
                draws.append(bits)
                self.characters += len(record.text)
                if self.characters >= BATCH_CHARACTERS:
                    self._flush()

    def _skipped(self, where: str, why: str) -> None:
        if len(self.result.skipped) < MAX_LISTED:
            self.result.skipped.append([where, why])

    def _writer(self, source: str, split: str) -> ShardWriter:
        if (source, split) not in self.writers:
            self.writers[source, split] = ShardWriter(self.folder, split, source, self.dtype)
        return self.writers[source, split]

    def _sample(
        self, ids: NDArray[np.uint32], source: str, part: Part, key: int, count: Count
    ) -> None:
        held_out, _ = self.job.split.held_out(self.task.source, part.file, key)
        size = int(byte_lengths(self.tokenizer)[ids].sum())
        self._writer(source, "held_out" if held_out else "train").add(
            ids, size, ends_in(ids, self.tokenizer.eos_id)
        )
        count.documents += 1
        count.tokens += len(ids)
        count.bytes += size

    def _flush(self) -> None:
        """Tokenize and write the documents that wait."""
        count = self.result.counts[self.task.source]
        for split, (texts, draws) in self.batches.items():
            if not texts:
                continue
            ids, lengths = self.encoder.batch(texts)
            first = 0 if self.result.verified else 4
            chosen = [i for i, draw in enumerate(draws) if i < first or not draw & 0xFF]
            self.result.verified += self.encoder.check(
                texts, ids, lengths, [i for i in chosen if len(texts[i]) <= CHECKED]
            )
            self._check_beginnings([texts[i] for i in chosen if len(texts[i]) > CHECKED])
            tokens, ends = delimited(ids, lengths, self.opening, self.closing)
            size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            self._writer(self.task.source, split).add(tokens, size, ends)
            count.tokens += len(tokens)
            count.bytes += size
            texts.clear()
            draws.clear()
        self.characters = 0

    def _check_beginnings(self, texts: list[str]) -> None:
        """Compare the first characters of long texts with the reference.

        All of a book would take longer than the rest of the task.
        """
        beginnings = [text[:CHECKED] for text in texts]
        if beginnings:
            self.result.verified += self.encoder.check(
                beginnings, *self.encoder.batch(beginnings), range(len(beginnings))
            )

    def _long(self, pieces: Iterator[str], split: str, count: Count) -> None:
        """Tokenize one document piece by piece."""
        writer = self._writer(self.task.source, split)
        size = 0

        def measured() -> Iterator[str]:
            nonlocal size
            for piece in pieces:
                if not size:
                    self._check_beginnings([piece])
                size += len(piece) if piece.isascii() else len(piece.encode())
                yield piece

        writer.open_for(1 << 62)  # in a shard of its own
        writer.extend(self.opening)
        for ids in self.encoder.long(measured()):
            writer.extend(ids)
        writer.extend(self.closing)
        count.tokens += writer.tokens
        count.bytes += size
        writer.end(size)
        writer.close()

    def _cut_in_two(self, record: Record, count: Count) -> None:
        """Write the only document of a source: its tail is held out."""
        characters = record.length()
        fraction = self.job.split.fraction
        cut = int(characters * (1 - fraction))
        if not 0 < cut < characters:
            raise UserError(
                f"{self.task.parts[0].path}: a text of {characters} characters is too short "
                f"to hold out {fraction:g} of it",
                hint="give more text, or hold out another fraction",
            )
        for split, begin, end in (("train", 0, cut), ("held_out", cut, characters)):
            self._long(_between(record.pieces(), begin, end), split, count)
        count.documents += 1


def _between(pieces: Iterator[str], begin: int, end: int) -> Iterator[str]:
    """The characters from `begin` up to `end` of a text in pieces."""
    at = 0
    for piece in pieces:
        if at < end and at + len(piece) > begin:
            yield piece[max(0, begin - at) : end - at]
        at += len(piece)


def delimited(
    ids: NDArray[np.uint32], lengths: NDArray[np.int64], opening: list[int], closing: list[int]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Documents end to end with BOS and EOS around each, and where each ends."""
    extra = len(opening) + len(closing)
    ends = np.cumsum(lengths + extra)
    if not extra:
        return ids, ends
    tokens = np.empty(len(ids) + extra * len(lengths), dtype=np.uint32)
    text = np.ones(len(tokens), dtype=bool)
    for places, token in (
        *((ends - lengths - extra + i, token) for i, token in enumerate(opening)),
        *((ends - len(closing) + i, token) for i, token in enumerate(closing)),
    ):
        tokens[places] = token
        text[places] = False
    tokens[text] = ids
    return tokens, ends


@functools.lru_cache(maxsize=2)
def load_encoder(folder: str, library: str, sha256: str) -> tuple[Tokenizer, Encoder]:
    """The tokenizer and the encoder of a folder.

    The hash tells apart tokenizers that have lain in the same place.
    """
    tokenizer = Tokenizer.load(Path(folder))
    if sha256 and tokenizer.sha256 != sha256:
        raise UserError(f"{folder}: not the tokenizer that the run began with", hint="run again")
    return tokenizer, Encoder(tokenizer, library)


def safe_name(name: str) -> str:
    """The name of a source, changed where it could not be that of a file."""
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]
    return (
        plain
        if plain == name
        else f"{plain}_{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"
    )


def tokenize(
    task: dict[str, Any], job: dict[str, Any], folder: Path, progress: Callable[[float], None]
) -> dict[str, Any]:
    """A task of `mobilellm.jobs`: a `Task`, a `Job` and the `TaskResult` as dictionaries.

    `UserError` for bad input, `encoder.MismatchError` for wrong ids of the fast library.
    """
    return asdict(TaskRun(Task.from_dict(task), Job.from_dict(job), folder, progress).run())
