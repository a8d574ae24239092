"""The loss on what the assistant says: each conversation alone, the tokens of its mask alone.

    nats, tokens = answers_loss(network, data.tokens("held_out"), sequence_length=512)

Conversations are packed into rows, and none sees another. One that is longer than a row is read in
windows that overlap by half.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mobilellm.data.stream import TokenStream
from mobilellm.evaluate.perplexity import ALONE, BATCH_TOKENS, Processes, summed_loss
from mobilellm.model.loss import IGNORED
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision

Piece = tuple[NDArray[np.int64], NDArray[np.int64]]


def answers_loss(
    network: Network,
    stream: TokenStream,
    *,
    sequence_length: int,
    stride: int = 0,
    every: int = 1,
    precision: Precision = Precision.FP32,
    batch_tokens: int = BATCH_TOKENS,
    processes: Processes = ALONE,
) -> tuple[float, int]:
    """Nats over the trained tokens of a stream of conversations, and how many these are.

    With `every` 2 only the first of each pair of documents counts: the chosen answers. `stride` is
    how far windows of a conversation that is longer than a row are apart; 0 is half a row.
    """
    rows = max(1, batch_tokens // sequence_length)
    batches = packed(stream, sequence_length, rows, stride or max(1, sequence_length // 2), every)
    return summed_loss(network, batches, precision=precision, processes=processes)


def packed(
    stream: TokenStream, sequence_length: int, rows: int, stride: int, every: int = 1
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]]:
    """(inputs, targets, documents) of up to `rows` rows: every trained token is a target once."""
    batch: list[list[Piece]] = []
    room = 0
    for piece in _pieces(stream, sequence_length, stride, every):
        size = len(piece[0])
        if size > room:
            if len(batch) == rows:
                yield _arrays(batch, sequence_length)
                batch = []
            batch.append([])
            room = sequence_length
        batch[-1].append(piece)
        room -= size
    if batch:
        yield _arrays(batch, sequence_length)


def _pieces(stream: TokenStream, length: int, stride: int, every: int) -> Iterator[Piece]:
    """(inputs, targets) of every conversation, of up to `length` tokens."""
    start = 0
    for number, end in enumerate(stream.ends().tolist()):
        begin, start = start, end
        if number % every:
            continue
        trained = stream.trained(begin, end - begin)
        if not trained[1:].any():
            continue
        count = int(np.flatnonzero(trained)[-1]) + 1  # what follows predicts nothing
        ids = stream.read(begin, count).astype(np.int64)
        scored = 1
        while scored < count:
            to = min(count, scored + (length if scored == 1 else stride))
            first = max(0, to - 1 - length)
            targets = np.where(trained[first + 1 : to], ids[first + 1 : to], IGNORED)
            targets[: scored - first - 1] = IGNORED
            yield ids[first : to - 1], targets
            scored = to


def _arrays(
    batch: list[list[Piece]], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """The rows of a batch, each filled up with tokens of no document that others see."""
    shape = (len(batch), length)
    inputs = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int32)
    for i, pieces in enumerate(batch):
        at = 0
        for number, (tokens, wanted) in enumerate(pieces):
            to = at + len(tokens)
            inputs[i, at:to], targets[i, at:to], documents[i, at:to] = tokens, wanted, number
            at = to
        documents[i, at:] = len(pieces)
    return inputs, targets, documents
