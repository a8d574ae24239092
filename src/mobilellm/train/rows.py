"""The metrics of a run: steps whose figures are still on the device, collected a few at a time,
written and shown.

recorder = Recorder(run, recipe, world, watcher, flops_per_token, peak_flops, skipped=0)
recorder.add(loss, norm, skipped, row, position, {})  # after every step, waiting for nothing
rows = recorder.collect()                           # once in log_every steps; here the host waits
recorder.publish(rows)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilellm.data.loader import DataState
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.hardware.device_memory import peak_memory
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow, add_figures
from mobilellm.tracking.trackers import Trackers
from mobilellm.train.run_folder import Metrics
from mobilellm.train.stopwatch import Lap, Stopwatch


class Watcher:
    """What a caller may want to see of a run; the command line draws it, tests and benchmarks
    record it."""

    def started(self, trainer: Any, step: int) -> None:
        """Before the first step, with the steps already done."""

    def stepped(self, row: MetricsRow) -> None:
        """After each recorded step, with its metrics."""

    def said(self, line: str) -> None:
        """Something worth a line."""


@dataclass
class Pending:
    """A step that was made, whose figures are still on the device."""

    loss: Tensor
    norm: Tensor
    skipped: Tensor
    lap: Lap
    row: MetricsRow
    position: DataState
    """Where its first sample stood in the data."""
    figures: Mapping[str, Tensor]
    """What else its objective says of it."""


class SkippedTooOften(Exception):  # noqa: N818  (control flow: the loop turns it into the user's line)
    """More steps in a row were skipped than a run is allowed to; `line` says which."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line


class Recorder:
    """Turns steps into rows of metrics.jsonl, in one process of a world."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        world: World,
        watcher: Watcher,
        flops_per_token: dict[str, int],
        peak_flops: Callable[[], float],
        skipped: int,
    ) -> None:
        """`skipped` steps were skipped before this process; `peak_flops` is asked for when the
        first rows are collected."""
        self.recipe, self.world, self.watcher = recipe, world, watcher
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.metrics = Metrics(run)
        self.trackers = Trackers(run, recipe, watcher.said) if world.main else None
        self.stopwatch = Stopwatch(world.device)
        self.skipped, self.skipped_in_a_row = skipped, 0
        self.pending: list[Pending] = []
        self.begun = self.clock = time.perf_counter()

    def add(
        self,
        loss: Tensor,
        norm: Tensor,
        skipped: Tensor,
        row: MetricsRow,
        position: DataState,
        figures: Mapping[str, Tensor],
    ) -> None:
        """Keep a step, with what the host knows of it; its time is the stopwatch's lap."""
        lap = self.stopwatch.lap()
        self.pending.append(Pending(loss, norm, skipped, lap, row, position, figures))

    def restart_clock(self) -> None:
        """From here on time counts as training time again: evaluations and checkpoints do not."""
        self.clock = time.perf_counter()

    def collect(self) -> list[MetricsRow]:
        """The metrics of the pending steps. `SkippedTooOften` after too many in a row; their rows
        are published first."""
        # The one place that waits for the device: once in log_every steps, for a few numbers a
        # step.
        figures = [
            torch.stack((p.loss, p.norm, p.skipped.to(p.loss.dtype), *p.figures.values()))
            for p in self.pending
        ]
        values = torch.stack(figures).tolist()
        shared = self._shared()
        rows: list[MetricsRow] = []
        for (loss, norm, skip, *others), step in zip(values, self.pending, strict=True):
            seconds = self.stopwatch.seconds(step.lap)
            phases = {f"{phase}_seconds": round(taken, 6) for phase, taken in seconds.items()}
            self.skipped += int(skip)
            row = step.row | {"loss": loss, "grad_norm": norm, "skipped": self.skipped}
            add_figures(row, dict(zip(step.figures, others, strict=True)))
            rows.append(row | phases | shared)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
            if skip:
                place = f"epoch {step.position.epoch}, samples from {step.position.samples} on"
                self._skipped(rows, place)
        self.pending = []
        return rows

    def _shared(self) -> MetricsRow:
        """What all pending steps have in common."""
        end = time.perf_counter()
        tokens = sum(self.recipe.batch_tokens(step.row["step"] - 1) for step in self.pending)
        speed = tokens / max(end - self.clock, 1e-9)
        peak = self.peak_flops()
        return {
            "tokens_per_second": round(speed, 1),
            "mfu_6n": round(speed * self.flops_per_token["six_n"] / peak, 5),
            "mfu_palm": round(speed * self.flops_per_token["palm"] / peak, 5),
            "memory_bytes": peak_memory(self.world.device),
            "seconds": round(end - self.begun, 3),
        }

    def _skipped(self, rows: list[MetricsRow], place: str) -> None:
        """Say that the last of `rows` was skipped. `SkippedTooOften` when it was one too many."""
        row = rows[-1]
        figures = (
            f"step {row['step']}: loss {row['loss']:.6g}, gradient norm {row['grad_norm']:.6g}"
        )
        if self.world.main:
            self.watcher.said(f"{figures}: skipped ({place})")
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_in_a_row:
            self.publish(rows)
            batch_tokens = self.recipe.batch_tokens(row["step"] - 1)
            sequences = batch_tokens // self.recipe.data.sequence_length
            raise SkippedTooOften(
                f"{figures}: {self.skipped_in_a_row} steps skipped in a row ({place}, {sequences} "
                "a step), "
                "training stopped"
            )

    def publish(self, rows: list[MetricsRow]) -> None:
        """Write rows to metrics.jsonl and the trackers, and show them."""
        if not self.world.main:
            return
        self.metrics.append(rows)
        for row in rows:
            self.watcher.stepped(row)
        if self.trackers is not None:
            self.trackers.send(rows)

    def close(self) -> None:
        """Let the trackers finish what they write."""
        if self.trackers is not None:
            self.trackers.close()


def stopped(error: SkippedTooOften, good: Path | None) -> UserError:
    """The user's line for a run that skipped too many steps, with its last good checkpoint."""
    return UserError(
        f"{error.line}; last good checkpoint: {good or 'none'}",
        hint="look at that data, or lower optimizer.learning_rate in a new run",
    )
