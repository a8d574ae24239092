"""What a task is: a function of this package, named by a string, that writes into its own folder.

    def count_words(task, job, folder, progress):           # in mobilellm/words.py
        (folder / "words.txt").write_text(...)
        return {"words": 7}                                 # what JSON can hold

    task = KeyedTask("book", {"file": "book.txt"})
    run_task("mobilellm.words:count_words", job, task, Path("tasks"), progress)

The name travels to worker processes, which import it. `run_task` gives a task's files and its
result their place all at once, so that a task is either finished or was never done.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.files import PARTIAL, disk_errors, sync, write_json

PACKAGE = __name__.split(".")[0]

Values = dict[str, Any]
"""What JSON can hold: settings, descriptions of tasks, results."""
Progress = Callable[[float], None]
TaskFunction = Callable[[Values, Values, Path, Progress], Values]
"""(task, job, folder, progress) -> result. `progress` is called with the weight done so far."""


class TaskError(Exception):
    """A failure that the caller of a task handles itself.

    It is raised again, with its own class and text, in the process that gave the task out. A
    subclass must be importable from this package and be made of one string.
    """


@dataclass(frozen=True)
class KeyedTask:
    """One task of a run."""

    key: str
    """The name of its folder. It must name everything that decides what the task writes."""
    values: Values
    """What the function needs to know of this task alone."""
    weight: float = 1.0
    """Its share of the work, on any scale."""


def resolve(name: str) -> Any:
    """The object of this package that "module:name" names. `ValueError` for any other string."""
    module, colon, attribute = name.partition(":")
    inside = module == PACKAGE or module.startswith(f"{PACKAGE}.")
    if not colon or not inside or not attribute.isidentifier():
        raise ValueError(f"{name!r} names nothing in {PACKAGE}: must be {PACKAGE}.MODULE:NAME")
    found = getattr(importlib.import_module(module), attribute, None)
    if found is None:
        raise ValueError(f"{name!r}: {module} has no {attribute}")
    return found


def name_of(thing: type[Any]) -> str:
    """The string that `resolve` turns into this class."""
    return f"{thing.__module__}:{thing.__qualname__}"


def run_task(
    function: str, job: Values, task: KeyedTask, folder: Path, progress: Progress
) -> Values:
    """Do one task here; its files and its result appear as `folder/KEY` all at once, or not at all.

    Raises what the function raises; `UserError` where the disk refuses.
    """
    with disk_errors(folder):
        staging = Path(tempfile.mkdtemp(prefix=f".{task.key}{PARTIAL}", dir=folder))
        try:
            perform: TaskFunction = resolve(function)
            result = perform(task.values, job, staging, progress)
            write_json(staging / "result.json", result)
            for inside, _, names in os.walk(staging):
                for name in names:
                    sync(Path(inside, name))
                sync(Path(inside))
            os.rename(staging, folder / task.key)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return result
