"""Preparation cut into tasks, each of which gives the same files whoever runs it, and when.

    tasks = plan(sources)                        # each is a few spans of files, about as much text as fits a shard
    result = tokenize(asdict(tasks[0]), asdict(job), folder, progress)     # writes folder/train/*.npy, folder/held_out/*.npy

A task that is finished lies in a folder named after everything that decides its content, so that a run that was killed goes on
with what is missing, and a run with other settings takes nothing that is not its own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.data.layout import UNNAMED
from mobilellm.data.order import derive_key
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.files import sha256_file
from mobilellm.prepare.documents import (
    COMPRESSED,
    MissingPackageError,
    ReadSettings,
    Record,
    Source,
    Span,
    kind,
    open_parquet,
    records,
    text_pieces,
)
from mobilellm.tokenizer.encoder import Encoder
from mobilellm.tokenizer.tokenizer import Tokenizer

TASK_VERSION = 1
MIN_BYTES, MAX_BYTES = 16 << 20, 512 << 20  # of text in a task
MAX_TASKS = 64  # about, while tasks are between the two
UNPACKS = 3  # bytes of text to expect of a compressed one
BATCH_CHARACTERS = 1 << 20  # of text tokenized at once
LONG = 1 << 21  # characters above which a document is tokenized in pieces
MAX_SPANS = 16  # of a compressed file, which each span unpacks from its start
CHECKED = 1 << 14  # characters of a text that are compared with the reference
MAX_LISTED = 100  # records left out that are named


@dataclass(frozen=True)
class Part:
    """A span of one file."""

    path: str
    size: int
    modified: int
    """Nanoseconds."""
    file: int
    """Number of the file in its source."""
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Task:
    """Spans of files of one source, in order."""

    source: str
    given: bool
    """Whether samples are of `source` whatever they say themselves."""
    parts: list[Part]
    weight: int
    """Bytes of the files that it covers."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """What `dataclasses.asdict` gave."""
        return cls(**{**values, "parts": [Part(**part) for part in values["parts"]]})


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """Which documents are held out: those whose draw is below a fraction, but for the ones named; and the tail of a source that
    is a single document."""

    rule: str
    """ "tail" when every source is a single document, else "documents"."""
    fraction: float
    seed: int
    tails: tuple[str, ...] | list[str] = ()
    """Sources that are a single document."""
    forced_out: list[Any] | None = None
    """(source, file, key) of a document that is held out whatever its draw."""
    forced_in: list[Any] | None = None

    def draw(self, source: str, file: int, key: int) -> tuple[float, int]:
        """A number in [0, 1) that depends on the document's place alone, and the 64 bits it is from."""
        bits = derive_key(self.seed, source, file, key)
        return bits / 2.0**64, bits

    def held_out(self, source: str, file: int, key: int) -> tuple[bool, int]:
        """Whether a document is held out, and 64 bits of its own."""
        draw, bits = self.draw(source, file, key)
        place = [source, file, key]
        if place == self.forced_out:
            return True, bits
        return (draw < self.fraction if place != self.forced_in else False), bits


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all tasks of a run have in common."""

    tokenizer: str
    """Folder of the tokenizer."""
    tokenizer_sha256: str
    library: str
    library_version: str
    split: SplitRule
    bos: bool
    eos: bool
    text_field: str
    sequence_length: int
    on_bad: str
    """ "stop" or "skip"."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        """What `dataclasses.asdict` gave."""
        return cls(**{**values, "split": SplitRule(**values["split"])})

    def key(self, task: Task) -> str:
        """Names everything that decides what a task writes."""
        job = {
            name: value for name, value in asdict(self).items() if name != "tokenizer"
        }  # its hash is there, its place is not
        content = {"version": TASK_VERSION, "task": asdict(task), "job": job}
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def plan(sources: list[Source]) -> list[Task]:
    """The tasks that cover every file of the sources, in order. They depend on the files alone, not on who runs them."""
    tasks: list[Task] = []
    total = sum(
        text_size(path, path.stat().st_size) for source in sources for path in source.files()
    )
    most = min(max(total // MAX_TASKS, MIN_BYTES), MAX_BYTES)
    for source in sources:
        held: list[Part] = []
        weight = 0
        for number, path in enumerate(source.files()):
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
            spans = _spans(path, status.st_size, most)
            for start, end in spans:
                part = Part(str(path), status.st_size, status.st_mtime_ns, number, start, end)
                cost = text_size(path, status.st_size) // len(spans)
                if held and weight + cost > most:
                    tasks.append(Task(source.name, source.given, held, weight))
                    held, weight = [], 0
                held = [*held, part]
                weight += cost
        if held:
            tasks.append(Task(source.name, source.given, held, weight))
    return tasks


def text_size(path: Path, size: int) -> int:
    """About how many bytes of text a file has."""
    return size * UNPACKS if path.suffix.lower() in (*COMPRESSED, ".parquet") else size


def _spans(path: Path, size: int, most: int) -> list[tuple[int, int | None]]:
    """How a file is divided, into about `most` bytes of text each."""
    if kind(path) == "text":
        return [(0, None)]
    if kind(path) == "parquet":
        try:
            file = open_parquet(path)
        except MissingPackageError:
            raise
        except UserError:
            return [(0, None)]  # the task says what is wrong with it
        groups, bounds, held = file.num_row_groups, [0], 0
        for group in range(groups):
            held += file.metadata.row_group(group).total_byte_size
            if held >= most and group + 1 < groups:
                bounds.append(group + 1)
                held = 0
        return list(zip(bounds, [*bounds[1:], None], strict=True))
    step = most
    if path.suffix.lower() in COMPRESSED:
        step = max(most // UNPACKS, -(-size // MAX_SPANS))
    bounds = list(range(0, max(1, size - step // 2), step))  # the last is up to one and a half
    return list(zip(bounds, [*bounds[1:], None], strict=True))


@dataclass
class Count:
    """What became of the records of one source."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    bad: int = 0


@dataclass
class TaskResult:
    """What a task wrote and saw."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: list[list[str]] = field(default_factory=list)
    """(place, reason) of the first records that were left out."""
    verified: int = 0
    """Documents whose ids were compared with the reference."""
    files: list[list[Any]] = field(default_factory=list)
    """(path, bytes, sha256) of the files that the task began."""


class TaskRun:
    """One task in progress."""

    def __init__(
        self, task: Task, job: Job, folder: Path, progress: Callable[[float], None]
    ) -> None:
        self.task, self.job, self.folder, self.progress = task, job, folder, progress
        self.tokenizer, self.encoder = _load(job.tokenizer, job.library, job.tokenizer_sha256)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.opening = (
            [self.tokenizer.bos_id] if job.bos and self.tokenizer.bos_id is not None else []
        )
        self.closing = (
            [self.tokenizer.eos_id] if job.eos and self.tokenizer.eos_id is not None else []
        )
        self.read = ReadSettings(
            text_field=job.text_field, vocab_size=self.tokenizer.vocab_size,
            sample_lengths=(job.sequence_length, job.sequence_length + 1),
        )  # fmt: skip
        self.writers: dict[tuple[str, str], ShardWriter] = {}
        self.batches: dict[str, tuple[list[str], list[int]]] = {
            "train": ([], []),
            "held_out": ([], []),
        }
        self.characters = 0
        self.counts = {task.source: Count()}
        self.result = TaskResult()

    def run(self) -> TaskResult:
        """Read the task's files, tokenize, write."""
        done = 0.0
        share = self.task.weight / max(1, len(self.task.parts))
        for part in self.task.parts:
            path = Path(part.path)
            self._unchanged(path, part)
            if part.start == 0:
                try:
                    self.result.files.append([part.path, part.size, sha256_file(path)])
                except OSError as error:
                    if self.job.on_bad == "stop":
                        raise UserError(
                            f"{path}: cannot be read ({error.strerror or error})"
                        ) from None
                    self.result.files.append([part.path, part.size, None])
            for record in records(path, Span(part.start, part.end), self.read):
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
                self.result.shards.append(shard | {"source": source, "split": split})
        self.result.counts = {name: asdict(count) for name, count in self.counts.items()}
        return self.result

    def _unchanged(self, path: Path, part: Part) -> None:
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"{path}: went away while it was read ({error.strerror})") from None
        if (status.st_size, status.st_mtime_ns) != (part.size, part.modified):
            raise UserError(
                f"{path}: changed while it was read", hint="run again when nothing writes to it"
            )

    def take(self, record: Record, part: Part) -> None:
        """Count a record, and tokenize what is in it. `UserError` for a bad one, unless those are skipped."""
        name = self.task.source
        if record.ids is not None and not self.task.given and record.source not in (None, UNNAMED):
            name = safe_name(str(record.source))
        count = self.counts.setdefault(name, Count())
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
                pieces = text_pieces(record.path) if record.path else iter([record.text or ""])
                self._long(pieces, split, count)
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
        from mobilellm.data.layout import ends_in

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
        count = self.counts[self.task.source]
        for split, (texts, draws) in self.batches.items():
            if not texts:
                continue
            ids, lengths = self.encoder.batch(texts)
            first = 0 if self.result.verified else 4
            sampled = [i for i, draw in enumerate(draws) if i < first or not draw & 0xFF]
            self.result.verified += self.encoder.check(
                texts, ids, lengths, [i for i in sampled if len(texts[i]) <= CHECKED]
            )
            self._check_beginnings([texts[i] for i in sampled if len(texts[i]) > CHECKED])
            tokens, ends = delimited(ids, lengths, self.opening, self.closing)
            size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            self._writer(self.task.source, split).add(tokens, size, ends)
            count.tokens += len(tokens)
            count.bytes += size
            texts.clear()
            draws.clear()
        self.characters = 0

    def _check_beginnings(self, texts: list[str]) -> None:
        """Compare with the reference on the first characters: all of a book would take longer than the rest of the task."""
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
            count.tokens += len(ids)
        writer.extend(self.closing)
        writer.end(size)
        writer.close()
        count.tokens += len(self.opening) + len(self.closing)
        count.bytes += size

    def _cut_in_two(self, record: Record, count: Count) -> None:
        """The only document there is: its tail is held out."""
        characters = len(record.text) if record.text is not None else record.characters
        fraction = self.job.split.fraction
        cut = int(characters * (1 - fraction))
        if not 0 < cut < characters:
            raise UserError(
                f"{self.task.parts[0].path}: a text of {characters} characters is too short to hold out {fraction:g} of it",
                hint="give more text, or hold out another fraction",
            )
        for split, begin, end in (("train", 0, cut), ("held_out", cut, characters)):
            pieces = text_pieces(record.path) if record.path else iter([record.text or ""])
            self._long(_between(pieces, begin, end), split, count)
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
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:  # fmt: skip
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
def _load(folder: str, library: str, sha256: str) -> tuple[Tokenizer, Encoder]:
    """The hash is there to tell tokenizers apart that have lain in the same place."""
    tokenizer = Tokenizer.load(Path(folder))
    if sha256 and tokenizer.sha256 != sha256:
        raise UserError(f"{folder}: not the tokenizer that the run began with", hint="run again")
    return tokenizer, Encoder(tokenizer, library)


@functools.lru_cache(maxsize=2)
def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each id stands for, (vocabulary size,); special tokens stand for none."""
    settings = orjson.loads(tokenizer.fast.to_str())
    by_letter = b'"ByteLevel"' in orjson.dumps(settings["decoder"])
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for piece, number in tokenizer.fast.get_vocab(with_added_tokens=True).items():
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and not by_letter:
            lengths[number] = 1
        else:
            lengths[number] = len(piece) if by_letter else len(piece.replace("▁", " ").encode())
    for added in settings["added_tokens"]:
        if added["special"]:
            lengths[added["id"]] = 0
    return lengths


def safe_name(name: str) -> str:
    """A source's own name as one that can be a file's."""
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

    `UserError` for bad input, `encoder.MismatchError` for wrong ids of the fast library."""
    return asdict(TaskRun(Task.from_dict(task), Job.from_dict(job), folder, progress).run())
