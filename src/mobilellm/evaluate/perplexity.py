"""Held-out loss, perplexity and bits per byte.

    score = perplexity(network, tokens, text_bytes, sequence_length=256)
    score.bits_per_byte

Bits per byte divides by the bytes of the original text, so that models with different tokenizers
compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mobilellm.errors import UserError
from mobilellm.model.loss import IGNORED
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision

BATCH_TOKENS = 8192
MAX_EXPONENT = 700  # exp of more exceeds a float


class Tokens(Protocol):
    """A flat stream of tokens, in memory or on disk."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TokenList:
    """Tokens in memory, as a stream."""

    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from `start` on."""
        return self.tokens[start : start + count]


class Processes(Protocol):
    """Processes that measure together. `train.world.World` is one of the kind."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up a small device tensor over all processes, in place."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor


ALONE = Alone()


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a text is predicted."""

    loss: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Total negative log-likelihood in bits over the UTF-8 bytes of the text."""
    tokens: int
    """Tokens scored."""
    bytes: int
    """UTF-8 bytes of the text."""


def windows(
    stream: Tokens, sequence_length: int, batch_tokens: int, prefix: int | None, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(inputs, targets) batches, each (B, T): every token of the stream is a target exactly once.

    With a `prefix` token before the stream, its first token is a target too; without one it cannot
    be. With stride < sequence_length the windows overlap, and in each only the last `stride`
    targets count.
    """
    extra = 0 if prefix is None else 1
    total = len(stream) + extra

    def read(start: int, count: int) -> np.ndarray:
        if prefix is None or start:
            return stream.read(start - extra, count).astype(np.int64)
        return np.concatenate(([prefix], stream.read(0, count - 1).astype(np.int64)))

    rows, inputs, targets = max(1, batch_tokens // sequence_length), [], []
    scored = 1  # the first position is context only
    while scored < total:
        # The first window scores all its targets, later ones `stride`, the last one what is left.
        end = min(total, scored + (sequence_length if scored == 1 else stride))
        start = max(0, end - 1 - sequence_length)
        window = read(start, end - start)
        target = window[1:].copy()
        target[: scored - start - 1] = IGNORED
        if len(target) == sequence_length:
            inputs.append(window[:-1])
            targets.append(target)
        else:  # the stream is shorter than one window, or ends here
            yield window[None, :-1], target[None]
        scored = end
        if len(inputs) == rows:
            yield np.stack(inputs), np.stack(targets)
            inputs, targets = [], []
    if inputs:
        yield np.stack(inputs), np.stack(targets)


def total_loss(
    network: Network,
    stream: Tokens,
    *,
    sequence_length: int,
    stride: int = 0,
    prefix: int | None = None,
    precision: Precision = Precision.FP32,
    batch_tokens: int = BATCH_TOKENS,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """Nats over all scored tokens of a stream, and how many were scored.

    `processes` divide the batches among them and all get the sum. A `stride` of 0 means windows
    that do not overlap; `progress(done, total)` counts the tokens of this process.
    """
    total = len(stream) - (prefix is None)
    batches = windows(stream, sequence_length, batch_tokens, prefix, stride or sequence_length)
    return summed_loss(
        network,
        batches,
        precision=precision,
        processes=processes,
        progress=progress and (lambda done: progress(done, total)),
    )


def summed_loss(
    network: Network,
    batches: Iterable[Sequence[np.ndarray]],
    *,
    precision: Precision = Precision.FP32,
    processes: Processes = ALONE,
    progress: Callable[[int], None] | None = None,
) -> tuple[float, int]:
    """Nats over all targets that count of batches of inputs and targets, each (B, T), and of their
    documents where tokens see their own alone; and how many targets these are.

    `processes` and `progress` as in `total_loss`.
    """
    device = next(network.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    counted = 0
    with torch.no_grad():  # inference mode would break a sharded network, which trains on
        for number, arrays in enumerate(batches):
            if number % processes.size != processes.rank:
                continue
            inputs, targets, *documents = (torch.from_numpy(a).to(device) for a in arrays)
            with precision.autocast(device):
                loss = network.loss(inputs, targets, "sum", *documents)
            scored = int((arrays[1] != IGNORED).sum())
            sums += torch.tensor([loss.item(), scored], dtype=torch.float64, device=device)
            counted += scored
            if progress:
                progress(counted)
    nats, tokens = processes.sum_(sums).tolist()
    return nats, int(tokens)


def perplexity(
    network: Network,
    stream: Tokens,
    text_bytes: int,
    *,
    sequence_length: int,
    stride: int = 0,
    prefix: int | None = None,
    precision: Precision = Precision.FP32,
    batch_tokens: int = BATCH_TOKENS,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score a stream of tokens that stand for `text_bytes` bytes of text; options as `total_loss`.

    `UserError` when there is nothing to score, or `sequence_length` exceeds the model's context.
    """
    check_windows(network, sequence_length, stride)
    nats, counted = total_loss(
        network,
        stream,
        sequence_length=sequence_length,
        stride=stride,
        prefix=prefix,
        precision=precision,
        batch_tokens=batch_tokens,
        processes=processes,
        progress=progress,
    )
    return score_of(nats, counted, text_bytes)


def check_windows(network: Network, sequence_length: int, stride: int) -> None:
    """`UserError` for windows that are longer than the network's context, or further apart than
    they are long."""
    context = network.config.max_position_embeddings
    if sequence_length > context:
        raise UserError(
            f"sequence length {sequence_length} exceeds the model's context of {context}"
        )
    if not 0 <= stride <= sequence_length:
        raise UserError(
            f"stride {stride}: must be from 1 to the sequence length {sequence_length}, "
            "or 0 for the same"
        )


def score_of(nats: float, counted: int, text_bytes: int) -> Score:
    """The score of `counted` tokens that stand for `text_bytes` bytes. `UserError` for none."""
    if not counted or not text_bytes:
        raise UserError("no text to score", hint="give a text of at least two tokens")
    mean = nats / counted
    return Score(
        loss=mean,
        perplexity=math.exp(mean) if mean < MAX_EXPONENT else math.inf,
        bits_per_byte=nats / math.log(2) / text_bytes,
        tokens=counted,
        bytes=text_bytes,
    )
