"""The live view of a run: a bar with losses on a terminal, lines of text elsewhere.

    with live_view() as watcher:
        outcome = start.train(run, recipe, watcher)

This module imports torch by way of the loop, so a verb imports it only when it runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from mobilellm.printable import printable
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow
from mobilellm.report.figures import count
from mobilellm.terminal.output import say
from mobilellm.train.loop import Trainer
from mobilellm.train.rows import Watcher


@contextlib.contextmanager
def live_view(main: bool = True) -> Iterator[Watcher]:
    """Yield what watches a run. Of a job's processes only the first (`main`) shows anything."""
    view = LiveView() if main else Watcher()
    try:
        yield view
    finally:
        if isinstance(view, LiveView):
            view.stop()


def _batch(recipe: Recipe) -> str:
    first, last = recipe.batch_tokens(0), recipe.train.batch_tokens
    return f"{last:,}" if first == last else f"{first:,} to {last:,}"


class LiveView(Watcher):
    """Shows a run on standard error."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.steps = 0
        self.log_every = 10

    def started(self, trainer: Trainer, step: int) -> None:
        """Say what is about to be trained, and on how many processes."""
        recipe, train, world = trainer.recipe, trainer.recipe.train, trainer.world
        optimizer, batching = recipe.optimizer, trainer.step.batching
        self.steps, self.log_every = train.steps, train.log_every
        say(
            f"training {count(trainer.costs.parameters['total'])} parameters for {train.steps} "
            f"steps of {_batch(recipe)} tokens, {train.precision}, "
            f"{'compiled' if train.compile == 'block' else 'eager'}"
            + (f", from step {step}" if step else "")
        )
        if world.size > 1 or batching.passes > 1:
            several = f"{world.size} processes ({recipe.parallel.kind})"
            say(
                f"{several if world.size > 1 else '1 process'}, each {batching.passes} x "
                f"{batching.micro_batch_size} sequences of {batching.sequence_length} tokens a step"
            )
        if optimizer.reference_batch_tokens:
            rate = optimizer.learning_rate
            say(
                f"learning rate {rate * recipe.learning_rate_factor:g}: {rate:g} at "
                f"{optimizer.reference_batch_tokens:,} tokens a step, scaled by the batch "
                f"({optimizer.batch_scaling})"
            )
        if sys.stderr.isatty():
            self.bar = progress_bar()
            self.task = self.bar.add_task("", total=train.steps, completed=step, loss="", rate="")
            self.bar.start()

    def stepped(self, row: MetricsRow) -> None:
        """Move the bar; print a line for a held-out score, and without a bar every few steps."""
        step = row["step"]
        if self.bar is not None:
            rate = f"{row['tokens_per_second']:,.0f}"
            self.bar.update(self.task, completed=step, loss=f"{row['loss']:.3f}", rate=rate)
        due = self.bar is None and (step % self.log_every == 0 or step == self.steps)
        if due or "held_out_loss" in row:
            self.said(line_of(row))

    def said(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(printable(line), highlight=False, markup=False)
        else:
            say(line)

    def stop(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()


def line_of(row: MetricsRow) -> str:
    """A row of metrics as one line."""
    held_out = ""
    if "held_out_loss" in row:
        bits = row["held_out_bits_per_byte"]
        held_out = f"  held-out {row['held_out_loss']:.4f} ({bits:.4f} bits a byte)"
    return (
        f"step {row['step']:>6}  loss {row['loss']:.4f}{held_out}  "
        f"lr {row['learning_rate']:.3g}  norm {row['grad_norm']:.3g}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  "
        f"MFU {row['mfu_6n']:.1%} (6N) {row['mfu_palm']:.1%} (PaLM)"
        + (f"  {row['skipped']} skipped" if row["skipped"] else "")
    )


def progress_bar() -> Any:
    """A bar of steps on standard error with loss, speed and the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
    )
