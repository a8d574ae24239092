"""Which kind of layer sharing weights were trained for, by trying both on a text."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mobilellm.evaluate.perplexity import TokenList, perplexity
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import Tokenizer


def measure_sharing(network: Network, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Loss (nats a token) of the same weights as either network, and `trained_for`, the kind
    with the lower one."""
    tokens = TokenList(np.asarray(tokenizer.encode(text), dtype=np.int64))
    losses: dict[str, float] = {}
    for kind in ("own", "first"):
        other = Network(dataclasses.replace(network.config, shared_kv=kind), initialized=False)
        other.load_state_dict(network.state_dict())
        length = min(512, network.config.max_position_embeddings)
        score = perplexity(
            other.eval(),
            tokens,
            len(text.encode()),
            sequence_length=length,
            prefix=tokenizer.prefix_id,
        )
        losses[kind] = score.loss
    return {
        "loss": losses,
        "trained_for": min(losses, key=losses.__getitem__),
        "tokens": len(tokens),
    }
