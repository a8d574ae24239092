"""The export-shaped forward gives the network's numbers, whole, in parts and traced."""

import itertools

import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.static import StaticNetwork

CONTEXT, TOKENS = 48, 40
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "plain": {},
    "one head of keys": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 6},
    "untied": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 32},
    "qk_norm": {"qk_norm": True},
    "llama3 scaling": {"rope_scaling": LLAMA3},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "sharing, own": {"layer_repeats": 2, "shared_kv": "own"},
    "sharing, first": {"layer_repeats": 2, "shared_kv": "first"},
    "sharing, all over": {"layer_repeats": 2, "layer_order": "all_over"},
    "sharing, reverse": {"layer_repeats": 3, "layer_order": "reverse"},
    "three times, first, qk_norm": {"layer_repeats": 3, "shared_kv": "first", "qk_norm": True},
}
CUTS = {
    "whole": [0, TOKENS],
    "chunks": [0, 17, 18, 33, TOKENS],
    "one by one": list(range(TOKENS + 1)),
}


def network_of(kind: str) -> Network:
    """Weights large enough that an error would show, norms away from one."""
    shape = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(1)
    network = Network(ModelConfig(**shape | KINDS[kind]))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.06)
    return network.eval()


def token_ids(batch_size: int = 2) -> torch.Tensor:
    return torch.randint(
        320, (batch_size, TOKENS), generator=torch.Generator().manual_seed(batch_size)
    )


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_networks(kind: str, cuts: str) -> None:
    network, ids = network_of(kind), token_ids()
    static = StaticNetwork(network, CONTEXT)
    cache, found = static.empty_cache(2), []
    assert cache.shape[1] == network.config.kv_slots
    cache.fill_(1e4)  # positions not yet filled must not be seen
    for start, end in itertools.pairwise(CUTS[cuts]):
        logits, cache = static(ids[:, start:end], torch.arange(start, end), cache)
        found.append(logits)
    expected = network(ids)
    assert expected.std() > 0.1
    assert (torch.cat(found, 1) - expected).abs().max() < 1e-5 * max(1, expected.std())


@torch.no_grad()
def test_the_cache_given_is_left_as_it_is() -> None:
    static = StaticNetwork(network_of("plain"), CONTEXT)
    cache = static.empty_cache()
    _, filled = static(token_ids(1), torch.arange(TOKENS), cache)
    assert not cache.any()
    assert filled[..., :TOKENS, :].any(-1).all()
    assert not filled[..., TOKENS:, :].any()


@pytest.mark.parametrize("kind", ["plain", "sharing, own", "three times, first, qk_norm", "untied"])
@torch.no_grad()
def test_the_exported_program_gives_the_same_numbers(kind: str) -> None:
    network, ids = network_of(kind), token_ids(1)
    static = StaticNetwork(network, CONTEXT)
    example = (ids[:, :7], torch.arange(7), static.empty_cache())
    program = torch.export.export(static, example, dynamic_shapes=static.dynamic_shapes()).module()
    expected = network(ids)
    for cuts in ([0, TOKENS], [0, 5, 6, 7, 30, TOKENS], list(range(TOKENS + 1))):
        cache, found = static.empty_cache(), []
        for start, end in itertools.pairwise(cuts):
            logits, cache = program(ids[:, start:end], torch.arange(start, end), cache)
            found.append(logits)
        assert (torch.cat(found, 1) - expected).abs().max() < 1e-5 * max(1, expected.std())


def test_weights_are_shared_and_tables_as_long_as_the_context() -> None:
    network = network_of("untied")
    static = StaticNetwork(network, CONTEXT)
    assert {id(p) for p in static.parameters()} == {id(p) for p in network.parameters()}
    for name, buffer in static.named_buffers():
        assert torch.equal(buffer, getattr(network, name)[:CONTEXT])
        assert buffer.shape[0] == CONTEXT


@pytest.mark.parametrize("context", [0, -1, 129])
def test_a_context_that_the_network_has_not_is_refused(context: int) -> None:
    with pytest.raises(UserError, match="from 1 to the model's 128"):
        StaticNetwork(network_of("plain"), context)
