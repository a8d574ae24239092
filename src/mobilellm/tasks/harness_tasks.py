"""Tasks of EleutherAI's lm-evaluation-harness, their own objects, reading local files instead of
downloads.

    tasks = load_tasks(["arc_easy", "hellaswag"], Path("data/eval"))
    tasks["arc_easy"].split, tasks["arc_easy"].is_choice

Prompts, choices, metrics and standard errors are the harness's. For the eight tasks of the
MobileLLM tables (arXiv 2402.14905, table 3) a folder of files in the harness's raw fields can
stand in for the download: only the loader is replaced.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from mobilellm.errors import UserError, first_line, unknown_name
from mobilellm.files import sha256_file


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A shipped set."""

    name: str
    split: str
    count: int
    sha256: str
    folder: str
    """Where its definition lies among the harness's."""


COMMONSENSE = {  # in the order of the published tables
    "arc_easy": DataFile(
        name="arc_easy.jsonl", split="test", count=2376, folder="arc",
        sha256="874354cf372667530bd6cbd2d78dca2d657c5e2e746f53cf01d1e9d3a90cbc3d",
    ),
    "arc_challenge": DataFile(
        name="arc_challenge.jsonl", split="test", count=1172, folder="arc",
        sha256="03227c30fd557ad1416c2cb955eeb6dc79eeb21e0679456a1ccd42eaccc0ff87",
    ),
    "boolq": DataFile(
        name="boolq.jsonl", split="validation", count=3270, folder="super_glue/boolq",
        sha256="2f7ec4dd1d9a6b85cb131d69cbd4acd5400d4d55faf333d4e75a5a4650b9383b",
    ),
    "piqa": DataFile(
        name="piqa.jsonl", split="validation", count=1838, folder="piqa",
        sha256="61533005e22f175534909b1ec8eacb6da03c233933558d1bafb15787453b1f55",
    ),
    "social_iqa": DataFile(
        name="social_iqa.jsonl", split="validation", count=1954, folder="siqa",
        sha256="17c8ece78c7b3f61cb21f53ad635940620c941542799580db06df5e47bf5e77e",
    ),
    "hellaswag": DataFile(
        name="hellaswag.jsonl.gz", split="validation", count=10042, folder="hellaswag",
        sha256="488198752ccac3c094995379154efbd80c2317b0a9fe0414f38970bfc4d1d0e2",
    ),
    "openbookqa": DataFile(
        name="openbookqa.jsonl", split="test", count=500, folder="openbookqa",
        sha256="bbaca15e985ba386b2f73e9659fce608cf7722a35343864dbe7115cbbda341ab",
    ),
    "winogrande": DataFile(
        name="winogrande.jsonl", split="validation", count=1267, folder="winogrande",
        sha256="69f3d7f3a900d775339b04c7de672609c40fca573e50f594f2ae66d8782505be",
    ),
}  # fmt: skip
WIKITEXT = DataFile(
    name="wikitext2_raw/wiki.test.pages.jsonl", split="test", count=62, folder="wikitext",
    sha256="85f09ca4c886eb81390d60d2318c4e9dab62e290c0e05425c97ce7790be559de",
)  # fmt: skip
SHIPPED = COMMONSENSE | {"wikitext": WIKITEXT}
ALIASES = {
    "siqa": "social_iqa",
    "obqa": "openbookqa",
    "arc_e": "arc_easy",
    "arc_c": "arc_challenge",
}
LARGEST_FILE = 256 << 20  # bytes, unpacked


def require_harness() -> str:
    """The version of lm-eval. `UserError` when it is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need the package lm-eval", hint="pip install 'mobilellm[eval]'")
    from importlib.metadata import version

    return version("lm_eval")


def expand(names: Iterable[str]) -> list[str]:
    """Task names in full: `commonsense` is the eight of the tables; short names are spelt out;
    each once."""
    found: dict[str, None] = {}
    for name in names:
        for one in COMMONSENSE if name == "commonsense" else [ALIASES.get(name, name)]:
            found[one] = None
    if not found:
        raise UserError(
            "no task named", hint="give --tasks commonsense, or names of the harness's tasks"
        )
    return list(found)


@dataclass(frozen=True)
class Document:
    """One item of a task."""

    index: int
    document: dict[str, Any]
    pairs: tuple[tuple[str, str], ...]
    """(context, continuation) of each choice."""


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task object of the harness, and where its data comes from."""

    name: str
    task: Any
    harness: str
    """Version of lm-eval."""
    altered: str = ""
    """What is wrong with the local file, when its content is not the known one."""

    @property
    def split(self) -> str:
        """The split that is scored."""
        return str(
            self.task.config.test_split
            if self.task.has_test_docs()
            else self.task.config.validation_split
        )

    @property
    def is_choice(self) -> bool:
        """Whether the model chooses among given continuations."""
        return self.task.OUTPUT_TYPE == "multiple_choice"

    def choices(self, document: dict[str, Any]) -> list[str]:
        """The texts a model chooses from."""
        return list(self.task.doc_to_choice(document))

    def gold(self, document: dict[str, Any]) -> list[int]:
        """Which choices are right: one, in most tasks."""
        found = (
            self.task.doc_to_text(document)
            if self.task.multiple_input
            else self.task.doc_to_target(document)
        )
        choices = self.choices(document)
        several = found if isinstance(found, list) else [found]
        return [choices.index(one) if isinstance(one, str) else int(one) for one in several]


def load_tasks(names: Iterable[str], data: Path | None) -> dict[str, HarnessTask]:
    """The harness's tasks by name. Of a folder `data` the shipped sets are read; without one the
    harness downloads.

    `UserError` for a name that is not known (the nearest is named), a missing or broken file, a
    failed download, or a task of `data` that is not among the shipped.
    """
    version, found = require_harness(), {}
    for name in expand(names):
        with quiet():
            found[name] = (
                local_task(name, data, version)
                if data is not None and name in SHIPPED
                else downloaded(name, version)
            )
    return found


@functools.cache
def _manager(folder: str | None) -> Any:
    """The harness's index of tasks: of one folder, or of all, which takes some eight seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_defaults=folder is None, include_path=[root / folder] if folder else None
    )


def local_task(name: str, data: Path, version: str) -> HarnessTask:
    """A shipped task reading its file in `data`.

    The harness's definition stands, but for the data and the splits: it lets a group override
    settings of the tasks in it.
    """
    known = SHIPPED[name]
    rows, altered = read_rows(data / known.name, known)

    def dataset(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({known.split: datasets.Dataset.from_list(rows)})

    splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
    splits[f"{known.split}_split"] = known.split
    override = {"task": name, "custom_dataset": dataset} | splits
    try:
        with quiet():
            group = {"group": "local", "task": [override]}
            task = _manager(known.folder).load([group])["tasks"][name]
    except Exception as error:
        # A field is missing or of another kind: the task's own code fails on it.
        if not altered:
            raise
        raise UserError(
            f"{altered}, and the task cannot read it ({type(error).__name__}: {error})"
        ) from error
    return HarnessTask(name=name, task=task, harness=version, altered=altered)


def read_rows(path: Path, known: DataFile) -> tuple[list[dict[str, Any]], str]:
    """Rows of a JSON-lines file (gzip or plain), and what differs from the known content (""
    when nothing)."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such task data",
            hint="give --data a folder with it, or none, for the harness's download",
        )
    altered = (
        ""
        if sha256_file(path) == known.sha256
        else f"{path}: altered, its sha256 is not the known {known.sha256[:12]}"
    )
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: more than {LARGEST_FILE} bytes of rows")
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: empty")
    if altered and len(rows) != known.count:
        altered += f", {len(rows)} rows where {known.count} are known"
    return rows, altered


def downloaded(name: str, version: str) -> HarnessTask:
    """Any task of the harness, with its own download."""
    manager = _manager(None)
    if name not in manager.all_tasks:
        raise unknown_name("task", name, {*manager.all_tasks, *ALIASES, "commonsense"})
    if name not in manager.all_subtasks:
        raise UserError(
            f"task {name!r} is a group of several",
            hint="name its tasks, or use the harness: lm_eval --tasks",
        )
    try:
        task = manager.load([name])["tasks"][name]
    except Exception as error:  # whatever the download machinery raises
        raise UserError(
            f"task {name!r}: its data could not be loaded ({type(error).__name__}: "
            f"{first_line(error)})",
            hint="give --data a folder with the eight shipped sets, or a network",
        ) from error
    return HarnessTask(name=name, task=task, harness=version)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's and its data library's remarks and progress bars from the terminal."""
    import datasets
    import tqdm  # type: ignore[import-untyped]

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    # The harness shows its bars without asking, and tqdm has no switch that acts after its import.
    initialize = tqdm.tqdm.__init__
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    tqdm.tqdm.__init__ = functools.partialmethod(initialize, disable=True)
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = initialize
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
