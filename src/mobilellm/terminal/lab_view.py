"""A lab at work on a terminal: one bar over all runs with the time left; lines of text elsewhere.

with LabView(print_lines) as view:
    work(folder, listener=view)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from mobilellm.lab.folder import Job
from mobilellm.lab.work import Listener, Progress
from mobilellm.printable import one_line
from mobilellm.records import MetricsRow
from mobilellm.terminal.output import duration, say
from mobilellm.train.rows import Watcher


class LabView(Listener):
    """Shows a lab on standard error."""

    def __init__(self, table: Callable[[], Sequence[str]]) -> None:
        """`table` gives the lines of the table so far, and is asked after every run."""
        self.table = table
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> LabView:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("", total=1.0, left="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def began(self, job: Job, progress: Progress) -> Watcher:
        """Name the run, and watch its steps."""
        name = f"{progress.done + progress.failed + 1}/{progress.runs}  {_name(job)}"
        self.show(name, progress, 0.0)
        if self.bar is None:
            say(f"{name}: training")
        return _Steps(self, job, name, progress)

    def ended(self, job: Job, why: str | None, progress: Progress) -> None:
        """Print the table so far on a terminal, else a line."""
        left = f", about {duration(progress.seconds_left)} left" if progress.seconds_left else ""
        line = f"{_name(job)}: {'finished' if why is None else f'failed: {one_line(why)}'}"
        lines = self.table()
        if self.bar is None:
            say(line + left)
            return
        self.bar.console.print(line + left, highlight=False, markup=False)
        for each in [*lines, ""]:
            self.bar.console.print(each, highlight=False, markup=False)

    def show(self, name: str, progress: Progress, share: float) -> None:
        """Move the bar; `share` of the run in progress is done."""
        if self.bar is None:
            return
        done = (progress.done + progress.failed + share) / max(1, progress.runs)
        left = f"about {duration(progress.seconds_left)} left"
        self.bar.update(self.task, completed=done, description=name, left=left)


def _name(job: Job) -> str:
    return f"{one_line(job.cell)}, seed {job.seed}"


class _Steps(Watcher):
    """Moves the bar of a lab by the steps of one run."""

    def __init__(self, view: LabView, job: Job, name: str, progress: Progress) -> None:
        """`name` says which run of all it is."""
        self.view, self.job, self.name, self.progress = view, job, name, progress

    def stepped(self, row: MetricsRow) -> None:
        """After each recorded step."""
        share = row["step"] / self.job.recipe.train.steps
        left = self.progress.seconds_left - share * self.job.seconds
        ahead = Progress(
            self.progress.done, self.progress.failed, self.progress.runs, max(0.0, left)
        )
        self.view.show(self.name, ahead, share)

    def said(self, line: str) -> None:
        """What the training says: steps skipped, checkpoints not written."""
        if self.view.bar is not None:
            self.view.bar.console.print(f"{self.name}: {line}", highlight=False, markup=False)
        else:
            say(f"{self.name}: {line}")
