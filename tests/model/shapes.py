"""Small shapes and networks that tests of several rooms share."""

from __future__ import annotations

import pytest
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network

# fmt: off
WIDTH_32 = ModelConfig(
    vocab_size=307, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)
WIDTH_64 = ModelConfig(  # each matrix is whole groups of 32 columns
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
)
# fmt: on


def learner_and_reference() -> tuple[Network, Network]:
    """Two networks whose distributions are far from even; the second one is not trained."""
    torch.manual_seed(0)
    both = Network(WIDTH_32), Network(WIDTH_32)
    with torch.no_grad():
        for network in both:
            for parameter in network.parameters():
                parameter.mul_(3)
    return both[0], both[1].requires_grad_(False)


def gradients(network: Network) -> dict[str, torch.Tensor]:
    """Each parameter's gradient, taken away from the network."""
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return found


def assert_same_gradients(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Within 1e-5 of each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def assert_same_step(network: Network, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two losses of a network are the same within float32's rounding, and so are their
    gradients."""
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    mine = gradients(network)
    expected.backward()
    assert_same_gradients(mine, gradients(network))
