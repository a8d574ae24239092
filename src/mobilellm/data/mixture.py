"""Several sources mixed by weight, in stages: who gives the next sample, and which.

    stages = [
        Stage(until_tokens=10**9, weights={"wiki": 0.7, "code": 0.3}),
        Stage(until_tokens=None, weights={"code": 1}),
    ]
    streams = {name: data.tokens("train", name) for name in data.sources()}
    for batch, state in Mixture(streams, stages, sequence_length=2048, batch_size=64, state=state):
        ...

All samples are of one length, so a weight by samples is a weight by tokens. Each source is owed
its weight at every sample; the one owed most gives it (smooth weighted round robin), so that
after any number of samples the shares are right to within one sample a source. What is owed is
part of the state, in whole numbers, so that weights may change at any time, by a stage or by
another recipe, without preparing anything again. Within a source the order is that of `Loader`:
a permutation for every epoch, each sample once. A mixture of one source gives exactly the
batches of `Loader`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.loader import Batch, DataState, Rows, Samples, SourceState, batch_sizes
from mobilellm.data.order import derive_key, permute
from mobilellm.data.stream import TokenStream
from mobilellm.errors import UserError, unknown_name

ONE = 1 << 40  # a sample's worth of credit


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with fixed weights."""

    until_tokens: int | None
    """Tokens since the start of training at which the stage ends; none for the last, which has
    no end."""
    weights: Mapping[str, float]
    """Share of the tokens by source; any positive scale. A source that is not named gives
    nothing."""


def check_stages(stages: Sequence[Stage], sources: Sequence[str]) -> None:
    """`UserError` unless stages follow on each other, the last has no end, and weights are of
    known sources."""
    if not stages:
        raise UserError("no stage given", hint="give one with weights for the sources")
    before = 0
    for number, stage in enumerate(stages, 1):
        where, last = f"stage {number}", number == len(stages)
        if stage.until_tokens is None:
            if not last:
                raise UserError(f"{where}: has no until_tokens, but is not the last")
        elif stage.until_tokens <= before:
            raise UserError(
                f"{where}: until_tokens is {stage.until_tokens}, must be above {before}",
                hint="they count from the start",
            )
        else:
            before = stage.until_tokens
        for name, weight in stage.weights.items():
            if name not in sources:
                raise unknown_name("source", name, sources, where)
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not math.isfinite(weight)
                or weight < 0
            ):
                raise UserError(
                    f"{where}: the weight of {name!r} is {weight!r}, must be a number from 0 up"
                )
        if not sum(stage.weights.values()) > 0:
            raise UserError(f"{where}: no source has a weight above 0")


class Mixture:
    """An endless iterator of (Batch, DataState): this process's rows of each global batch, and
    the state after it."""

    def __init__(
        self,
        streams: Mapping[str, TokenStream],
        stages: Sequence[Stage],
        sequence_length: int,
        batch_size: int | Iterator[int],
        state: DataState,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
    ) -> None:
        """`batch_size`, of all batches or of each in turn, counts samples over all processes and
        divides by `world_size`. The last stage goes on for ever.

        Only sources that have a weight in some stage need hold a sample. `UserError` for stages
        or weights that make no sense, streams shorter than a sample, and a `state` of other data
        or another sequence length.
        """
        check_stages(stages, list(streams))
        self.sizes = batch_sizes(batch_size, world_size)
        used = {name for stage in stages for name, weight in stage.weights.items() if weight > 0}
        self.names = sorted(used)
        self.samples = {name: Samples(streams[name], sequence_length, name) for name in self.names}
        self.stages, self.length = list(stages), sequence_length
        self.rank, self.world_size, self.mask_documents = rank, world_size, mask_documents
        self.weights = [self._whole(stage) for stage in self.stages]
        alone = len(streams) == 1
        if alone and not state.sources:  # a position of `Loader`'s, which counts no tokens
            count = self.samples[self.names[0]].count
            state = replace(state, tokens=(state.epoch * count + state.samples) * sequence_length)
        self.state = replace(state, sources=self._sources(state, alone))

    def _whole(self, stage: Stage) -> dict[str, int]:
        """Weights as whole credits, of sources that have one, in the order of their names."""
        total = sum(stage.weights.values())
        return {
            name: max(1, round(ONE * stage.weights[name] / total))
            for name in self.names
            if stage.weights.get(name, 0) > 0
        }

    def _sources(self, state: DataState, alone: bool) -> dict[str, SourceState]:
        """The recorded positions, with new sources at their start; those without a weight now
        are kept as they are."""
        found = dict(state.sources)
        if not found and (state.epoch or state.samples) and not alone:
            raise UserError(
                "the position is one in a single source, and now there are several",
                hint="start a new run",
            )
        for name in self.names:
            count = self.samples[name].count
            if name not in found:
                start = (state.epoch, state.samples) if alone and not found else (0, 0)
                key = "" if alone else name
                found[name] = SourceState(
                    epoch=start[0], samples=start[1], samples_per_epoch=count, key=key
                )
            elif found[name].samples_per_epoch != count:
                raise UserError(
                    f"source {name!r} had {found[name].samples_per_epoch} samples when this "
                    f"position was taken, now {count}",
                    hint="resume with the same data and data.sequence_length",
                )
        return dict(sorted(found.items()))

    def stage(self, tokens: int) -> int:
        """Which stage holds once this many tokens are taken."""
        for number, stage in enumerate(self.stages):
            if stage.until_tokens is None or tokens < stage.until_tokens:
                return number
        return len(self.stages) - 1

    def _choose(self, credits: dict[str, int], size: int) -> list[str]:
        """The source of each of the `size` samples of the next batch; what the sources are owed is
        brought up to date."""
        chosen = []
        for i in range(size):
            weights = self.weights[self.stage(self.state.tokens + i * self.length)]
            for name, weight in weights.items():
                credits[name] += weight
            best = max(weights, key=credits.__getitem__)
            credits[best] -= sum(weights.values())
            chosen.append(best)
        return chosen

    def __iter__(self) -> Iterator[tuple[Batch, DataState]]:
        for size in self.sizes:
            share, state = size // self.world_size, self.state
            credits = {name: source.credit for name, source in state.sources.items()}
            chosen = self._choose(credits, size)
            # Where each sample stands in the batch: shuffled, so that no process and no micro-batch
            # gets one source only.
            total = state.tokens // self.length
            places = np.arange(size)
            if len(self.names) > 1:
                places = permute(places, size, derive_key(state.seed, "places", total))
            names = np.array(chosen)
            masked = any(samples.stream.masked for samples in self.samples.values())
            beside = self.samples[self.names[0]].stream.beside
            rows = Rows(share, self.length, self.mask_documents, masked, beside)
            sources = dict(state.sources)
            for name in self.names:
                position, count = sources[name], self.samples[name].count
                mine = places[names == name]
                taken = position.samples + np.arange(len(mine))
                kept = (mine >= self.rank * share) & (mine < (self.rank + 1) * share)
                self._fill(
                    name,
                    position,
                    taken[kept],
                    mine[kept] - self.rank * share,
                    state.seed,
                    rows,
                )
                behind = position.samples + len(mine)
                sources[name] = replace(
                    position,
                    epoch=position.epoch + behind // count,
                    samples=behind % count,
                    credit=credits[name],
                )
            alone = len(sources) == 1
            first = next(iter(sources.values()))
            self.state = replace(
                state,
                tokens=state.tokens + size * self.length,
                sources=sources,
                epoch=first.epoch if alone else 0,
                samples=first.samples if alone else state.samples + size,
            )
            yield rows.batch(), self.state

    def _fill(
        self,
        name: str,
        position: SourceState,
        taken: NDArray[np.int64],
        into: NDArray[np.int64],
        seed: int,
        rows: Rows,
    ) -> None:
        """Read samples number `taken` of a source, counted from the start of its present epoch,
        into the rows `into`."""
        samples = self.samples[name]
        epochs, numbers = position.epoch + taken // samples.count, taken % samples.count
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            starts = samples.starts(seed, epoch, numbers[now], position.key)
            for i, start in zip(into[now].tolist(), starts.tolist(), strict=True):
                samples.read(start, rows, i)
