"""Weights under their names on disk: a vocabulary that grows."""

import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import grow_vocabulary, load_weights, to_named

IDS = torch.arange(40)[None] * 7 % 64


def small(tied: bool) -> Network:
    """A random network with a vocabulary of 64."""
    torch.manual_seed(0)
    return Network(ModelConfig.preset("1M", vocab_size=64, tie_word_embeddings=tied)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_keeps_old_logits_and_adds_the_mean_row(tied: bool) -> None:
    network = small(tied)
    named = to_named(network.config, dict(network.named_parameters()))
    config, grown = grow_vocabulary(network.config, named, 70)
    assert config.vocab_size == 70
    larger = Network(config, initialized=False)
    load_weights(larger, grown)
    with torch.no_grad():
        before, after = network(IDS), larger.eval()(IDS)
    assert torch.allclose(after[..., :64], before, atol=1e-6)
    # Logits are linear in the output rows, so that a mean row gives the mean of the old logits.
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 6)
    assert torch.allclose(after[..., 64:], mean, atol=1e-5)
    rows = larger.embed_tokens.weight.detach()
    assert torch.equal(rows[:64], network.embed_tokens.weight)
    assert torch.allclose(rows[64:], rows[:64].mean(0).expand(6, -1), atol=1e-7)


def test_rows_in_half_precision_keep_their_type() -> None:
    network = small(tied=True)
    named = to_named(network.config, dict(network.named_parameters()))
    half = {name: tensor.to(torch.bfloat16) for name, tensor in named.items()}
    _, grown = grow_vocabulary(network.config, half, 65)
    assert {tensor.dtype for tensor in grown.values()} == {torch.bfloat16}
    expected = half["model.embed_tokens.weight"].double().mean(0).to(torch.bfloat16)
    assert torch.equal(grown["model.embed_tokens.weight"][64], expected)


def test_the_same_vocabulary_changes_nothing_and_a_smaller_one_is_refused() -> None:
    network = small(tied=False)
    named = to_named(network.config, dict(network.named_parameters()))
    config, same = grow_vocabulary(network.config, named, 64)
    assert config == network.config
    assert all(same[name] is tensor for name, tensor in named.items())
    with pytest.raises(UserError, match=r"63 tokens is smaller than the model's 64") as caught:
        grow_vocabulary(network.config, named, 63)
    assert "\n" not in str(caught.value)
