"""Preparation cut into tasks, each of which gives the same files whoever does it, and when.

    # Each is a few spans of files, about as much text as fits a shard.
    tasks = plan(sources)
    key = job.key(tasks[0])             # the name of its folder

A finished task lies in a folder named after everything that decides its content, so that a run
that was killed goes on with what is missing, and a run with other settings takes nothing that is
not its own. `task_run` does a task.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.readers.reader import Span
from mobilellm.readers.table import spans, text_size
from mobilellm.streams.places import Place, Status, status_of

TASK_VERSION = 1
MIN_BYTES, MAX_BYTES = 16 << 20, 512 << 20  # of text in a task
MAX_TASKS = 64  # about, while tasks are between the two


@dataclass(frozen=True)
class Part:
    """A span of one file."""

    path: str
    size: int
    modified: int
    """Nanoseconds; of an address, what its store says (`mobilellm.streams.places.Status`)."""
    file: int
    """Number of the file in its source."""
    start: int = 0
    end: int | None = None

    @property
    def span(self) -> Span:
        """The span, as readers take it."""
        return Span(self.start, self.end)


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
    separator: str | None = None
    """Between the documents of a text file."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        """What `dataclasses.asdict` gave."""
        return cls(**{**values, "split": SplitRule(**values["split"])})

    def key(self, task: Task) -> str:
        """Names everything that decides what a task writes."""
        # The tokenizer's hash decides, its place does not.
        job = {name: value for name, value in asdict(self).items() if name != "tokenizer"}
        content = {"version": TASK_VERSION, "task": asdict(task), "job": job}
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def plan(sources: list[Source]) -> list[Task]:
    """The tasks that cover every file of the sources, in order.

    They depend on the files alone, not on who does them. `UserError` for a file that cannot be
    read, or where there is none.
    """
    tasks: list[Task] = []
    files = [[(path, _status(path)) for path in source.files()] for source in sources]
    total = sum(text_size(path, status.size) for own in files for path, status in own)
    most = min(max(total // MAX_TASKS, MIN_BYTES), MAX_BYTES)
    for source, own in zip(sources, files, strict=True):
        held: list[Part] = []
        weight = 0
        for number, (path, status) in enumerate(own):
            divided = spans(path, status.size, most)
            for span in divided:
                part = Part(str(path), status.size, status.modified, number, span.start, span.end)
                cost = text_size(path, status.size) // len(divided)
                if held and weight + cost > most:
                    tasks.append(Task(source.name, source.given, held, weight))
                    held, weight = [], 0
                held = [*held, part]
                weight += cost
        if held:
            tasks.append(Task(source.name, source.given, held, weight))
    return tasks


def _status(path: Place) -> Status:
    try:
        return status_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
