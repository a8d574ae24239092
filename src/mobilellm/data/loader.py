"""Batches in an exact order: every token once an epoch, resumable at any sample, the same for any number of processes.

    loader = Loader(data.tokens("train"), sequence_length=256, batch_size=32, state=DataState(seed=0, ...))
    for batch, state in loader:     # endless; `state` is where the next batch begins
        ...

The stream is read as a circle. An epoch cuts it into N // T samples from a random phase on and takes them in a random order,
both computed from (seed, epoch). So each token is trained on exactly once an epoch, but for the N mod T behind the last
sample, which are others every epoch; and borders between samples fall elsewhere every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.order import derive_key, permute
from mobilellm.data.shards import TokenStream
from mobilellm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataState:
    """A position in the data, of all processes together."""

    seed: int
    """Decides the order."""
    epoch: int
    """Passes over the data completed."""
    samples: int
    """Samples taken in this epoch."""
    fingerprint: str
    """Of the data this position is in."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        """The position that `to_dict` wrote."""
        return cls(**values)


@dataclass(frozen=True)
class Batch:
    """One step's samples, (B, T) int64 each."""

    inputs: NDArray[np.int64]
    """Tokens."""
    targets: NDArray[np.int64]
    """The token after each."""


class Loader:
    """An endless iterator of (Batch, DataState): this process's rows of each global batch, and the state behind it."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        batch_size: int,
        state: DataState,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`batch_size` counts samples over all processes and divides by `world_size`.

        `UserError` when the stream is shorter than one sample.
        """
        if len(stream) < sequence_length + 1:
            raise UserError(
                f"{len(stream)} training tokens are less than one sample of {sequence_length} and the token after it",
                mend="shorten data.sequence_length, or prepare more text",
            )
        if batch_size % world_size:
            raise UserError(f"{batch_size} sequences a step do not divide by {world_size} processes")
        self.stream, self.length, self.batch_size, self.state = stream, sequence_length, batch_size, state
        self.rank, self.world_size = rank, world_size
        self.samples_per_epoch = len(stream) // sequence_length

    def starts(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions on the circle where the given samples of an epoch begin."""
        phase = derive_key(self.state.seed, epoch, "phase") % len(self.stream)
        order = permute(samples, self.samples_per_epoch, derive_key(self.state.seed, epoch, "order"))
        return (phase + order * self.length) % len(self.stream)

    def gather(self, starts: NDArray[np.int64]) -> Batch:
        """Read the samples that begin at these positions."""
        rows = np.empty((len(starts), self.length + 1), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            piece = self.stream.read(start, self.length + 1)
            row[: len(piece)] = piece
            if len(piece) < len(row):
                row[len(piece) :] = self.stream.read(0, len(row) - len(piece))
        return Batch(rows[:, :-1], rows[:, 1:])

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        share = self.batch_size // self.world_size
        while True:
            epoch, taken = self.state.epoch, self.state.samples
            numbers = taken + np.arange(self.batch_size)  # beyond the epoch's end they belong to the epochs after it
            epochs, samples = epoch + numbers // self.samples_per_epoch, numbers % self.samples_per_epoch
            mine = slice(self.rank * share, (self.rank + 1) * share)
            starts = np.concatenate([self.starts(int(e), samples[mine][epochs[mine] == e]) for e in np.unique(epochs[mine])])
            behind = taken + self.batch_size
            self.state = replace(
                self.state, epoch=epoch + behind // self.samples_per_epoch, samples=behind % self.samples_per_epoch
            )
            yield self.gather(starts), self.state
