"""Batches in an exact order: every token once an epoch, resumable at any sample, the same for
any number of processes.

    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)
    loader = Loader(data.tokens("train"), sequence_length=256, batch_size=32, state=state)
    for batch, state in loader:     # endless; `state` is where the next batch begins
        ...

A stream of documents is read as a circle. An epoch cuts it into N // T samples from a random
phase on and takes them in a random order, both computed from (seed, epoch). So each token is
trained on exactly once an epoch, but for the N mod T after the last sample, which are others
every epoch; and borders between samples fall elsewhere every time.

A stream of rows (the original layout, whose samples were cut when it was made) is taken row by
row: a sample is a row, or a whole fraction of one, and never reaches into the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.order import derive_key, permute
from mobilellm.data.stream import Beside, TokenStream
from mobilellm.errors import UserError
from mobilellm.schema import AtLeast

NOT_TRAINED = -100  # the target that counts for nothing, as in torch's cross_entropy
BLOCK = 256  # samples whose places are worked out at once


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """A position in one source of a mixture."""

    epoch: Annotated[int, AtLeast(0)] = 0
    """Passes over the source completed."""
    samples: Annotated[int, AtLeast(0)] = 0
    """Samples taken in this pass."""
    samples_per_epoch: Annotated[int, AtLeast(1)]
    """Samples in a pass: another number means other data, or another sequence length."""
    credit: int = 0
    """What the source is owed (or has had too much of), in units of 2^-40 samples."""
    key: str = ""
    """What its order is derived from, beside the seed and the epoch."""


@dataclass(frozen=True, kw_only=True)
class DataState:
    """A position in the data, of all processes together."""

    seed: int
    """Decides the order."""
    epoch: Annotated[int, AtLeast(0)]
    """Passes over the data completed. Of a mixture of several sources, 0: each source counts its
    own."""
    samples: Annotated[int, AtLeast(0)]
    """Samples taken in this epoch; of a mixture of several sources, in all."""
    fingerprint: str
    """Of the data this position is in."""
    tokens: int = 0
    """Tokens taken in all: what the stages of a mixture are measured in. A plain loader leaves
    it at 0."""
    sources: Mapping[str, SourceState] = field(default_factory=dict)
    """A mixture's position in each of its sources."""

    def __post_init__(self) -> None:
        read = {
            name: SourceState(**value) if isinstance(value, Mapping) else value
            for name, value in self.sources.items()
        }
        object.__setattr__(self, "sources", read)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataState:
        """What `to_dict` gave, also before it knew sources."""
        return cls(**values)

    def epochs(self) -> dict[str, float]:
        """How many times each source of a mixture has been gone through: 1.25 is once and a
        quarter."""
        return {
            name: source.epoch + source.samples / source.samples_per_epoch
            for name, source in self.sources.items()
        }


@dataclass(frozen=True)
class Batch:
    """One step's samples, (B, T) each."""

    inputs: NDArray[np.int64]
    """Tokens."""
    targets: NDArray[np.int64]
    """The token after each; -100 where it is not trained on."""
    documents: NDArray[np.int32] | None = None
    """Which document of its row each input token belongs to: 0 for the row's first, 1, ... An
    EOS belongs to the document it ends, so that the token after it is the first of the next."""
    beside: tuple[NDArray[Any], ...] = ()
    """What lies beside the stream (see `Beside`), each (B, ...)."""


class Rows:
    """Room for the samples of a batch, filled one by one."""

    def __init__(
        self, count: int, length: int, documents: bool, masked: bool, beside: Beside | None = None
    ) -> None:
        """`documents` and `masked` make room for document numbers and for what is trained on,
        `beside` for what lies beside the stream."""
        self.tokens: NDArray[np.int64] = np.empty((count, length + 1), dtype=np.int64)
        self.documents = np.empty((count, length), dtype=np.int32) if documents else None
        self.trained = np.ones((count, length + 1), dtype=bool) if masked else None
        shapes = () if beside is None else beside.rows
        self.beside = tuple(np.zeros((count, *shape), dtype) for shape, dtype in shapes)

    def batch(self) -> Batch:
        """The samples as inputs and targets."""
        inputs, targets = self.tokens[:, :-1], self.tokens[:, 1:]
        if self.trained is not None:
            targets = np.where(self.trained[:, 1:], targets, NOT_TRAINED)
        return Batch(inputs, targets, self.documents, self.beside)


class Samples:
    """The samples of one stream: how many there are, where each begins in an epoch's order, and
    what they hold."""

    def __init__(self, stream: TokenStream, sequence_length: int, name: str = "") -> None:
        """`UserError` when the stream is shorter than a sample, or its rows cannot be cut into
        samples."""
        self.stream, self.length = stream, sequence_length
        self._blocks: dict[tuple[int, int, int, str], NDArray[np.int64]] = {}
        of = f" of {name!r}" if name else ""
        if stream.row:
            # Rows of 2,049 ids hold two samples of 1,024 and the token after; rows of 2,048 too,
            # the second a token earlier.
            self.pieces, rest = divmod(stream.row - 1, sequence_length)
            if rest:
                if rest != sequence_length - 1 or not self.pieces:
                    fitting = [
                        n for n in range(2, stream.row) if (stream.row - 1) % n in (0, n - 1)
                    ]
                    raise UserError(
                        f"the samples{of} have {stream.row} ids and cannot be cut into sequences "
                        f"of {sequence_length}",
                        hint=f"set data.sequence_length to {', '.join(map(str, fitting[-4:]))}",
                    )
                self.pieces += 1
            self.count = len(stream) // stream.row * self.pieces
        else:
            self.count = len(stream) // sequence_length if len(stream) > sequence_length else 0
        if not self.count:
            raise UserError(
                f"{len(stream)} training tokens{of} are less than one sample of {sequence_length} "
                "and the token after it",
                hint="shorten data.sequence_length, or prepare more text",
            )

    def starts(
        self, seed: int, epoch: int, samples: NDArray[np.int64], key: str = ""
    ) -> NDArray[np.int64]:
        """Positions where the given samples of an epoch begin."""
        blocks = samples // BLOCK
        if len(samples) and (blocks == blocks[0]).all():
            return self._block(seed, epoch, int(blocks[0]), key)[samples - blocks[0] * BLOCK]
        found = np.empty(len(samples), dtype=np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            found[here] = self._block(seed, epoch, block, key)[samples[here] - block * BLOCK]
        return found

    def _block(self, seed: int, epoch: int, block: int, key: str) -> NDArray[np.int64]:
        """Where samples number BLOCK * block and on begin: worked out many at a time, which
        costs a tenth of one by one."""
        label = (seed, epoch, block, key)
        if label not in self._blocks:
            parts = (seed, key, epoch) if key else (seed, epoch)
            samples = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.count))
            order = permute(samples, self.count, derive_key(*parts, "order"))
            starts = self.places(order)
            if not self.stream.row:
                fixed = self.stream.beside is not None
                phase = 0 if fixed else derive_key(*parts, "phase") % len(self.stream)
                starts = (phase + starts) % len(self.stream)
            while len(self._blocks) > 3:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[label] = starts
        return self._blocks[label]

    def places(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where samples begin that lie at fixed places, counted from the stream's beginning."""
        if row := self.stream.row:
            inside = np.minimum(numbers % self.pieces * self.length, row - 1 - self.length)
            return numbers // self.pieces * row + inside
        return numbers * self.length

    def number(self, start: int) -> int:
        """Which sample begins at `start`, counted from the beginning of a stream whose samples lie
        at fixed places."""
        if row := self.stream.row:
            return start // row * self.pieces + -(-(start % row) // self.length)
        return start // self.length

    def gather(self, starts: NDArray[np.int64], documents: bool = False) -> Batch:
        """The samples that begin at these positions; `documents` says whether each token's
        document is wanted."""
        stream = self.stream
        rows = Rows(len(starts), self.length, documents, stream.masked, stream.beside)
        for i, start in enumerate(starts.tolist()):
            self.read(start, rows, i)
        return rows.batch()

    def read(self, start: int, rows: Rows, i: int) -> None:
        """Fill row `i` of `rows` with the sample that begins at `start`."""
        row, documents = rows.tokens[i], None if rows.documents is None else rows.documents[i]
        piece = self.stream.read(start, self.length + 1)
        have = len(piece)
        if have > self.length:
            row[:] = piece
        else:
            row[:have] = piece
            row[have:] = self.stream.read(0, len(row) - have)
        if rows.trained is not None and self.stream.masked:
            bits = self.stream.trained(start, self.length + 1)
            rows.trained[i, : len(bits)] = bits
            if len(bits) <= self.length:
                rows.trained[i, len(bits) :] = self.stream.trained(0, self.length + 1 - len(bits))
        if documents is not None:
            numbers = self.stream.documents(start, self.length)
            have = len(numbers)
            documents[:have] = numbers
            if have < self.length:  # the circle closes: another document begins
                documents[have:] = numbers[-1] + 1 + self.stream.documents(0, self.length - have)
        if self.stream.beside is not None:
            found = self.stream.beside.read(self.number(start))
            for array, values in zip(rows.beside, found, strict=True):
                array[i] = values


class Loader:
    """An endless iterator of (Batch, DataState): this process's rows of each global batch, and
    the state after it."""

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        batch_size: int | Iterator[int],
        state: DataState,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
    ) -> None:
        """`batch_size`, of all batches or of each in turn, counts samples over all processes and
        divides by `world_size`.

        `UserError` when the stream is shorter than one sample.
        """
        self.samples = Samples(stream, sequence_length)
        self.stream, self.length, self.state = stream, sequence_length, state
        self.sizes = batch_sizes(batch_size, world_size)
        self.rank, self.world_size, self.mask_documents = rank, world_size, mask_documents
        self.samples_per_epoch = self.samples.count

    def starts(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions where the given samples of an epoch begin."""
        return self.samples.starts(self.state.seed, epoch, samples)

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        for size in self.sizes:
            share = size // self.world_size
            epoch, taken = self.state.epoch, self.state.samples
            # Beyond the epoch's end they belong to the epochs after it.
            numbers = taken + np.arange(size)
            epochs, samples = (
                epoch + numbers // self.samples_per_epoch,
                numbers % self.samples_per_epoch,
            )
            mine = slice(self.rank * share, (self.rank + 1) * share)
            starts = np.concatenate(
                [
                    self.starts(int(e), samples[mine][epochs[mine] == e])
                    for e in np.unique(epochs[mine])
                ]
            )
            behind = taken + size
            self.state = replace(
                self.state,
                epoch=epoch + behind // self.samples_per_epoch,
                samples=behind % self.samples_per_epoch,
            )
            yield self.samples.gather(starts, self.mask_documents), self.state


def batch_sizes(batch_size: int | Iterator[int], world_size: int) -> Iterator[int]:
    """The size of each batch. `UserError` unless every process gets as many samples of it."""
    if isinstance(batch_size, int):
        _check_world(batch_size, world_size)
        return itertools.repeat(batch_size)
    return (_check_world(size, world_size) for size in batch_size)


def _check_world(size: int, world_size: int) -> int:
    if size % world_size:
        raise UserError(f"{size} sequences a step do not divide by {world_size} processes")
    return size
