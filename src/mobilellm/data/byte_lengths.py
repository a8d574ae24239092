"""Bytes of text that each id of a tokenizer stands for, so that text is counted from its ids.

int(byte_lengths(tokenizer)[ids].sum())
"""

from __future__ import annotations

import functools

import numpy as np
import orjson
from numpy.typing import NDArray

from mobilellm.tokenizer.tokenizer import Tokenizer


@functools.lru_cache(maxsize=2)
def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of each id's text, (vocabulary size,); special tokens have none."""
    settings = orjson.loads(tokenizer.fast.to_str())
    by_letter = b'"ByteLevel"' in orjson.dumps(settings["decoder"])
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for piece, number in tokenizer.fast.get_vocab(with_added_tokens=True).items():
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and not by_letter:
            lengths[number] = 1
        else:
            lengths[number] = len(piece) if by_letter else len(piece.replace("▁", " ").encode())
    for added in settings["added_tokens"]:
        if added["special"]:
            lengths[added["id"]] = 0
    return lengths
