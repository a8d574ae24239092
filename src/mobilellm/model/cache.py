"""Keys and values of the positions seen so far, so that each token is computed once.

cache = KVCache(network.config, batch_size=1, max_length=512, like=network.embed_tokens.weight)
network(prompt, cache)                 # (1, T): fills T positions
network(next_token, cache)             # (1, 1): one more
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.model.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, K, S, D)."""


class KVCache:
    """Memory taken once, with one slot for each K/V that the network really has
    (`ModelConfig.kv_slots`)."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, like: Tensor) -> None:
        """Room for `max_length` positions, with the type and on the device of `like`."""
        heads, width = config.num_key_value_heads, config.head_dim
        shape = (2, config.kv_slots, batch_size, heads, max_length, width)
        self.store = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0
        """Positions filled in every slot."""

    def append(self, slot: int, key: Tensor, value: Tensor) -> KeyValue:
        """Put new (B, K, T, D) keys and values after the cached ones of `slot`; return all of
        them."""
        end = self.length + key.shape[2]
        self.store[0, slot, :, :, self.length : end] = key
        self.store[1, slot, :, :, self.length : end] = value
        return self.store[0, slot, :, :, :end], self.store[1, slot, :, :, :end]
