"""Where a step's time goes, without waiting for the device while it runs.

watch = Stopwatch(device)
watch.mark("data")
watch.mark("compute")
watch.mark("optimizer")
lap = watch.lap()
# Seconds of each phase, {"data": 0.0001, "compute": 0.21, "optimizer": 0.02}, once the device
# has come there.
watch.seconds(lap)
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

Lap = list[tuple[str, float, Any]]


class Stopwatch:
    """Marks on the host's clock and, on a GPU, in the device's own stream."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: Lap = []

    def mark(self, phase: str) -> None:
        """From here on time belongs to `phase`."""
        event = None
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((phase, time.perf_counter(), event))

    def lap(self) -> Lap:
        """End the last phase; returns the marks and begins anew."""
        self.mark("end")
        marks, self.marks = self.marks, []
        return marks

    def seconds(self, lap: Lap) -> dict[str, float]:
        """Seconds of each phase: the device's own for what runs there, the host's for "data" and
        "checkpoint"."""
        found: dict[str, float] = {}
        for (phase, start, first), (_, end, second) in itertools.pairwise(lap):
            device_time = self.cuda and phase not in ("data", "checkpoint")
            seconds = first.elapsed_time(second) / 1e3 if device_time else end - start
            found[phase] = found.get(phase, 0.0) + seconds
        return found
