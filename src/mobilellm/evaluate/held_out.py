"""The loss of a model on text that it was not trained on: the held-out part of data, or any text.

    held_out(network, TokenFolder.open(path), sequence_length=256).loss
    score_text(network, tokenizer, Path("book.txt"), sequence_length=256).bits_per_byte

There is one way to count it, for one process and for many: what the training loop writes into a
run's metrics is what `mobilellm eval RUN` prints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mobilellm.data.dataset import Data, open_dataset
from mobilellm.errors import UserError
from mobilellm.evaluate.conversations import answers_loss
from mobilellm.evaluate.perplexity import (
    ALONE,
    Processes,
    Score,
    TokenList,
    check_windows,
    perplexity,
    score_of,
    total_loss,
)
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.streams.places import Place
from mobilellm.streams.text import text_pieces
from mobilellm.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
MIN_TOKENS = 2  # one to predict from and one to predict


def held_out(
    network: Network,
    data: Data,
    *,
    sequence_length: int,
    stride: int = 0,
    precision: Precision = Precision.FP32,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> Score:
    """Score of the held-out tokens of `data`, each once; options and errors as `perplexity`.

    Of conversations the assistant's tokens are scored, over the bytes that it says, each
    conversation alone; of pairs of answers the chosen ones. The training loop, the end of a run and
    `mobilellm eval` all call this.
    """
    if data.masked:
        check_windows(network, sequence_length, stride)
        pairs = data.preferences
        nats, counted = answers_loss(
            network,
            data.tokens("held_out"),
            sequence_length=sequence_length,
            stride=stride,
            every=2 if pairs else 1,
            precision=precision,
            processes=processes,
        )
        size = pairs["chosen_bytes"]["held_out"] if pairs else data.text_bytes("held_out")
        return score_of(nats, counted, max(1, size))
    return perplexity(
        network,
        data.tokens("held_out"),
        max(1, data.text_bytes("held_out")),
        sequence_length=sequence_length,
        stride=stride,
        prefix=data.prefix_id,
        precision=precision,
        processes=processes,
        progress=progress,
    )


def held_out_of_source(
    network: Network,
    data: Data,
    source: str,
    *,
    sequence_length: int,
    precision: Precision = Precision.FP32,
    processes: Processes = ALONE,
) -> float | None:
    """Loss of one source's held-out tokens, nats a token; None for fewer than two tokens."""
    stream = data.tokens("held_out", source)
    if len(stream) < MIN_TOKENS:
        return None
    if data.masked:
        nats, counted = answers_loss(
            network,
            stream,
            sequence_length=sequence_length,
            precision=precision,
            processes=processes,
        )
        return nats / counted if counted else None
    nats, counted = total_loss(
        network,
        stream,
        sequence_length=sequence_length,
        prefix=data.prefix_id,
        precision=precision,
        processes=processes,
    )
    return nats / counted


def score_data(
    network: Network,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    sequence_length: int,
    stride: int = 0,
    precision: Precision = Precision.FP32,
    progress: Progress | None = None,
) -> Score:
    """Score the held-out part of a data folder, prepared or in the original layout.

    `UserError` when it was prepared with another tokenizer than the model's.
    """
    return held_out(
        network,
        open_dataset(folder, tokenizer, verify=True),
        sequence_length=sequence_length,
        stride=stride,
        precision=precision,
        progress=progress,
    )


def score_text(
    network: Network,
    tokenizer: Tokenizer,
    path: Place,
    *,
    sequence_length: int,
    stride: int = 0,
    precision: Precision = Precision.FP32,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score a text file (UTF-8), as one text after the tokenizer's prefix token.

    `max_tokens` ends the text after so many.
    """
    ids, text_bytes = text_tokens(tokenizer, path, max_tokens)
    return perplexity(
        network,
        TokenList(ids),
        text_bytes,
        sequence_length=sequence_length,
        stride=stride,
        prefix=tokenizer.prefix_id,
        precision=precision,
        progress=progress,
    )


def text_tokens(
    tokenizer: Tokenizer, path: Place, max_tokens: int | None = None
) -> tuple[np.ndarray, int]:
    """The tokens of a text file, no more than `max_tokens`, and the bytes that they stand for."""
    text = read_text(path)
    ids = tokenizer.encode(text)
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        text = tokenizer.decode(ids)
    return np.asarray(ids, dtype=np.int64), len(text.encode())


def read_text(path: Place) -> str:
    """A text file's content, unpacked, without a byte order mark. `UserError` when it is missing,
    empty or not UTF-8."""
    try:
        text = "".join(text_pieces(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not text:
        raise UserError(f"{path}: empty")
    return text
