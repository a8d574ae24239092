"""Held-out conversations side by side: what was said there, what the model says, and what it said
before its training.

    talks = conversation_samples(data, loaded, Path("runs/base"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.interop.loaded import Loaded
from mobilellm.model.generation import Sampling
from mobilellm.model.network import Network
from mobilellm.records import Talk
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import ends_of_turn
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.train.origin import read_origin

TALKS = 4
ANSWER_TOKENS = 120


def conversation_samples(data: TokenFolder, loaded: Loaded, base: Path | None) -> list[Talk]:
    """The first answers of a few held-out conversations, greedy; those of `base` are left out where
    it cannot be read any more."""
    tokenizer, before = data.tokenizer(), _base(data, base)
    stop = sorted(ends_of_turn(tokenizer, ChatTemplate.of(tokenizer)))
    found: list[Talk] = []
    for asked, said in _openings(data, loaded.config.max_position_embeddings):
        talk: Talk = {
            "asked": tokenizer.decode(asked),
            "said": tokenizer.decode(said, skip_special_tokens=True),
            "tuned": _answer(loaded.network, tokenizer, asked, stop),
        }
        if before is not None:
            talk["base"] = _answer(before, tokenizer, asked, stop)
        found.append(talk)
    return found


def _openings(data: TokenFolder, context: int) -> list[tuple[list[int], list[int]]]:
    """What comes before the first answer, and that answer; of pairs, the chosen one."""
    stream, begin, found = data.tokens("held_out"), 0, []
    for number, end in enumerate(stream.ends().tolist()):
        start, begin = begin, end
        if data.preferences is not None and number % 2:
            continue
        bits = stream.trained(start, end - start)
        first = int(np.argmax(bits))
        if not bits[first] or not 0 < first < context:
            continue
        rest = bits[first:]
        last = first + (int(np.argmin(rest)) if not rest.all() else len(rest))
        ids = [int(i) for i in stream.read(start, last)]
        found.append((ids[:first], ids[first:]))
        if len(found) == TALKS:
            break
    return found


def _base(data: TokenFolder, path: Path | None) -> Network | None:
    """The network that the training started from, with rows for the data's new tokens."""
    if path is None:
        return None
    try:
        return read_origin(path, data).network()
    except UserError:
        return None  # moved away since: the run does not need it


def _answer(
    network: Network, tokenizer: Tokenizer, asked: Sequence[int], stop: Sequence[int]
) -> str:
    """What a network says after `asked`, by its likeliest tokens."""
    room = network.config.max_position_embeddings - len(asked)
    ids = network.generate(asked, min(ANSWER_TOKENS, room), Sampling(temperature=0.0), stop)
    return tokenizer.decode(list(ids), skip_special_tokens=True)
