"""What tests read of a run, and who listens to one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mobilellm.train.rows import Watcher


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none where it has not yet written any."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint."""
    return load_file(checkpoint / "model.safetensors")


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and random state of a checkpoint, whichever file holds them."""
    found = weights(checkpoint)
    for path in (checkpoint / "train_state").glob("*.safetensors"):
        found |= load_file(path)
    assert len(found) > 20
    return found


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights, moments and random state, bit for bit."""
    mine, theirs = tensors(a), tensors(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def same(a: Path, b: Path) -> bool:
    """`same_tensors`, and the same position: steps, tokens, data, the guard's statistics."""
    states = [(path / "train_state/state.json").read_bytes() for path in (a, b)]
    return same_tensors(a, b) and states[0] == states[1]


class Listener(Watcher):
    """Keeps the lines that a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, line: str) -> None:
        self.lines.append(line)


class StopAt(Watcher):
    """Sends this process a signal when a step is recorded."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def stepped(self, row: dict) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)
