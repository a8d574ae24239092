"""Tasks that do little: imported as `mobilellm.toy_tasks` by the workers of the tests."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.jobs.task import Progress, TaskError

Values = dict[str, Any]


class ToyError(TaskError):
    """A failure with a class of its own."""


def note(job: Values, line: str) -> None:
    """Append a line to the log of a run."""
    with open(job["log"], "a") as file:
        file.write(f"{line}\n")


def square(task: Values, job: Values, folder: Path, progress: Progress) -> Values:
    """The square of a number, also written to a file; `sleep` seconds pass."""
    note(job, f"{task['number']} {os.getpid()}")
    progress(task.get("done", 0.0))
    time.sleep(task.get("sleep", 0.0))
    (folder / "square.txt").write_text(str(task["number"] ** 2))
    return {"square": task["number"] ** 2}


def fail(task: Values, job: Values, folder: Path, progress: Progress) -> Values:
    """Fail in the way that the task names, or do as `square` does."""
    (folder / "half.txt").write_text("half")
    how = task.get("how")
    if how == "user":
        raise UserError("toy.txt:7: broken", hint="mend line 7")
    if how == "toy":
        raise ToyError("two ids differ")
    if how == "bug":
        raise ZeroDivisionError("a bug of the task")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "print":
        print("this is no answer", flush=True)
    return square(task, job, folder, progress)


def remember(log: str) -> None:
    """What a process is told to do before its tasks."""
    note({"log": log}, f"warm {os.getpid()}")
    if log.endswith("bad"):
        raise ValueError("left to the task")
