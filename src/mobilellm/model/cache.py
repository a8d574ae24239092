"""Keys and values of the positions seen so far, so that each token is computed once.

cache = KVCache(network.config, batch_size=1, max_length=512, like=network.embed_tokens.weight)
network(prompt, cache)                 # (1, T): fills T positions
network(next_token, cache)             # (1, 1): one more
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mobilellm.budget import ask
from mobilellm.model.attention_spec import FULL
from mobilellm.model.config import ModelConfig

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B, K, S, D)."""


class KVCache:
    """Memory taken once, with one slot for each K/V that the network really has
    (`ModelConfig.kv_slots`). A slot whose layer has a sliding window holds no more positions than
    that, each at its position's place modulo the window."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, like: Tensor) -> None:
        """Room for `max_length` positions, with the type and on the device of `like`. `UserError`
        where it takes more memory than there is."""
        heads, width = config.num_key_value_heads, config.head_dim

        def room(slots: int, length: int) -> Tensor:
            shape = (2, slots, batch_size, heads, length, width)
            ask(math.prod(shape) * like.dtype.itemsize, f"a cache of {max_length:,} positions")
            return torch.empty(shape, dtype=like.dtype, device=like.device)

        specs = [spec.within(max_length) for spec in config.slot_specs]
        full = [slot for slot, spec in enumerate(specs) if spec == FULL]
        self.store = room(len(full), max_length)
        self.places = {slot: place for place, slot in enumerate(full)}
        """Where a slot that holds every position lies in `store`."""
        self.windows = {
            slot: room(1, spec.held(max_length))[:, 0]
            for slot, spec in enumerate(specs)
            if spec != FULL
        }
        """Keys and values of each other slot, (2, B, K, W, D)."""
        self.shortest = min((ring.shape[3] for ring in self.windows.values()), default=max_length)
        """Positions after which a window forgets the first one."""
        self.length = 0
        """Positions seen. It may be set to 0, which empties the cache, and to any smaller number
        while it is not above `shortest`."""

    def append(self, slot: int, key: Tensor, value: Tensor) -> KeyValue:
        """Put new (B, K, T, D) keys and values after the cached ones of `slot`; return all of those
        that one of them may see: of a slot with a window of W the last W - 1 cached ones, in their
        order, and the new; for a single new token W in any order."""
        if slot in self.windows:
            return self._slide(self.windows[slot], key, value)
        end, place = self.length + key.shape[2], self.places[slot]
        self.store[0, place, :, :, self.length : end] = key
        self.store[1, place, :, :, self.length : end] = value
        return self.store[0, place, :, :, :end], self.store[1, place, :, :, :end]

    def _slide(self, ring: Tensor, key: Tensor, value: Tensor) -> KeyValue:
        """`append` to a ring of W positions."""
        new = torch.stack((key, value)).to(ring.dtype)
        W, past, T = ring.shape[3], self.length, key.shape[2]
        if T == 1:
            ring[:, :, :, past % W] = new[:, :, :, 0]
            seen = ring[:, :, :, : past + 1]  # all of the ring once it is full
            return seen[0], seen[1]
        kept = torch.arange(past - min(past, W - 1), past, device=ring.device)
        seen = torch.cat((ring[:, :, :, kept % W], new), dim=3)
        last = torch.arange(past + max(0, T - W), past + T, device=ring.device)
        ring[:, :, :, last % W] = new[:, :, :, -len(last) :]
        return seen[0], seen[1]
