"""Dropout: what it drops, where it acts, and that compiled and eager draws are the same."""

import pytest
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.dropout import dropped
from mobilellm.model.network import Network


def test_a_share_of_the_numbers_is_zero_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.ones(3, 1000, 67, requires_grad=True)
    y = dropped(x, 0.5)
    assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.005)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    for place in range(8):  # each byte of a draw decides alike
        share = (y.flatten()[place::8] == 0).float().mean().item()
        assert share == pytest.approx(0.5, abs=0.02)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    assert not torch.equal(dropped(x, 0.5), y)


def test_it_acts_in_training_alone_at_every_write_to_the_residual_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.preset("1M", vocab_size=64, num_hidden_layers=3, layer_repeats=2))
    ids = torch.randint(64, (2, 16))
    with torch.no_grad():
        plain = network(ids)
    network.drop(0.2)
    with torch.no_grad():
        assert torch.equal(network(ids), plain)
    seen = []
    monkeypatch.setattr(
        "mobilellm.model.network.dropped", lambda x, rate: (seen.append((x.shape, rate)), x)[1]
    )
    torch.testing.assert_close(network(ids).detach(), plain)
    width = network.config.hidden_size
    assert seen == [(torch.Size((2, 16, width)), 0.2)] * (1 + 2 * 3 * 2)
