"""What simpler predictors make of the same bytes: a unigram model and two general compressors.

A language model that does not beat them has learnt nothing worth its parameters.
"""

from __future__ import annotations

import gzip
import lzma
import math
from typing import Any

import numpy as np

from mobilellm.evaluate.perplexity import Tokens

MAX_BYTES = 4 << 20  # of each text that the compressors see: xz takes about a second for each MiB
CHUNK = 1 << 22  # tokens counted at once


def counts(stream: Tokens, vocab_size: int) -> np.ndarray:
    """How often each token occurs, (V,) int64."""
    total = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(stream), CHUNK):
        total += np.bincount(stream.read(start, CHUNK), minlength=vocab_size)
    return total


def baselines(
    train: Tokens,
    held_out: Tokens,
    held_out_bytes: int,
    vocab_size: int,
    train_text: str,
    held_out_text: str,
) -> dict[str, Any]:
    """Bits per byte of the held-out text under three predictors, and `bytes_compressed`, how
    much the compressors saw.

    `unigram`: token frequencies of the training split, one added to each. `gzip` and `xz`: the
    held-out text alone, at their highest settings. `xz_after_train`: what it adds after the
    training text, the nearest a compressor comes to having been trained.
    """
    frequencies = counts(train, vocab_size) + 1.0
    nats = -(counts(held_out, vocab_size) * np.log(frequencies / frequencies.sum())).sum()
    text, before = held_out_text.encode()[:MAX_BYTES], train_text.encode()[:MAX_BYTES]

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {
        "unigram": float(nats / math.log(2) / held_out_bytes),
        "gzip": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz": 8 * xz(text) / len(text),
        "xz_after_train": 8 * (xz(before + text) - xz(before)) / len(text),
        "bytes_compressed": len(text),
    }
