"""Rotary tables are made as far as they are used."""

import dataclasses

import pytest
import torch
from tests.interop.networks import network

from mobilellm import budget
from mobilellm.errors import UserError
from mobilellm.model import rope
from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.rope import cos_sin, first_positions

LONG = ModelConfig.preset("1M", max_position_embeddings=1 << 20, num_hidden_layers=1)


def test_a_long_context_costs_what_is_used_of_it() -> None:
    assert first_positions(ModelConfig.preset("125M")) == 2048  # whole, as before
    most = rope.TABLE_BYTES // (4 * LONG.head_dim)
    assert first_positions(LONG) == most < 1 << 20
    found = Network(LONG, initialized=False)
    assert found.cos.shape == (most, 1, LONG.head_dim // 2)
    found.rotation(0, most)
    assert found.cos.shape[0] == most
    with torch.inference_mode():
        cos, sin = found.rotation(most, most + 3)
    assert found.cos.shape[0] == 2 * most
    assert not found.cos.is_inference()  # which could not be trained with
    whole = cos_sin(LONG, most + 3)
    for part, table in zip((cos, sin), whole, strict=True):
        assert torch.equal(part[:, 0], table[most:])
    assert found.rotation((1 << 20) - 1, 1 << 20)[0].shape[0] == 1


def test_a_table_that_grew_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(max_position_embeddings=64)
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        expected = model(ids)
        monkeypatch.setattr(rope, "TABLE_BYTES", 4 * model.config.head_dim * 5)
        small = Network(model.config, initialized=False)
        small.load_state_dict(model.state_dict())
        assert small.cos.shape[0] == 5
        assert torch.equal(small(ids), expected)
        cache = KVCache(small.config, 1, 40, like=small.embed_tokens.weight)
        parts = [small(piece, cache) for piece in ids.split(13, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_what_does_not_fit_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "room", lambda: 64 << 20)
    with pytest.raises(UserError, match="rotary tables of 1,048,576 positions"):
        cos_sin(dataclasses.replace(LONG, head_dim=1024))
    with pytest.raises(UserError, match=r"weights in float32: 0.5 GiB of memory"):
        Network(ModelConfig.preset("125M"), initialized=False)
    small = Network(LONG, initialized=False)
    with pytest.raises(UserError, match="a cache of 1,048,576 positions"):
        KVCache(LONG, 1, 1 << 20, like=small.embed_tokens.weight)
