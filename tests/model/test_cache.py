"""A cache has one slot for each K/V that the network really has, and every part asks one count."""

import pytest
import torch

from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network


@pytest.mark.parametrize(
    ("repeats", "shared_kv", "slots"),
    [(1, "own", 3), (1, "first", 3), (2, "own", 6), (2, "first", 3), (3, "own", 9)],
)
def test_slots_are_those_that_the_network_fills(
    monkeypatch: pytest.MonkeyPatch, repeats: int, shared_kv: str, slots: int
) -> None:
    config = ModelConfig.preset(
        "1M",
        vocab_size=300,
        num_hidden_layers=3,
        layer_repeats=repeats,
        shared_kv=shared_kv,
    )
    filled: list[int] = []
    append = KVCache.append
    monkeypatch.setattr(
        KVCache, "append", lambda self, slot, k, v: filled.append(slot) or append(self, slot, k, v)
    )
    cache = KVCache(config, 1, 4, like=torch.empty(0))
    Network(config)(torch.tensor([[1, 2, 3]]), cache)
    assert filled == list(range(slots))
    assert config.kv_slots == slots
    assert cache.store.shape[1] == slots
    assert ModelCosts.of(config).kv_slots == slots
    width = config.num_key_value_heads * config.head_dim
    assert ModelCosts.of(config).kv_cache_bytes_per_token(4) == 2 * 4 * slots * width
    assert cache.store[:, :, 0, 0, 0].numel() * 4 * config.num_key_value_heads == 8 * slots * width


def test_new_keys_and_values_come_after_the_cached_ones() -> None:
    config = ModelConfig.preset("1M", vocab_size=300)
    heads, width = config.num_key_value_heads, config.head_dim
    cache = KVCache(config, 2, 5, like=torch.empty(0, dtype=torch.float64))
    key, value = (torch.randn(2, heads, 5, width, dtype=torch.float64) for _ in "kv")
    cache.append(1, key[:, :, :3], value[:, :, :3])
    cache.length = 3
    found = cache.append(1, key[:, :, 3:], value[:, :, 3:])
    assert cache.store.dtype == torch.float64
    assert torch.equal(found[0], key)
    assert torch.equal(found[1], value)
