"""Our causal attention against torch's, value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from mobilellm.model import attention
from mobilellm.model.attention import causal_attention
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4, 100, 16), (2, 6, 2, 64, 8), (2, 3, 1, 129, 32), (1, 2, 1, 1, 8), (1, 2, 2, 1100, 8)],
)
def test_value_and_gradients_equal_torchs(shape: tuple[int, ...]) -> None:
    B, H, K, T, D = shape
    generator = torch.Generator().manual_seed(0)

    def make(heads: int) -> torch.Tensor:
        random = torch.randn(B, T, heads, D, generator=generator)
        return random.transpose(1, 2).detach().requires_grad_()

    q, k, v = make(H), make(K), make(K)
    weight = torch.randn(B, H, T, D, generator=generator)
    ours = causal_attention(q, k, v)[0]
    mine = torch.autograd.grad((ours * weight).sum(), (q, k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad((theirs * weight).sum(), (q, k, v))
    assert (ours - theirs).abs().max() < 1e-5
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_it_is_a_sound_operator() -> None:
    for order in ((0, 1, 2, 3), (0, 2, 1, 3)):  # heads first, and rows first in memory
        q, k, v = (
            torch.randn([(1, n, 20, 8)[i] for i in order]).permute(order).requires_grad_()
            for n in (4, 2, 2)
        )
        torch.library.opcheck(causal_attention, (q, k, v))


def test_training_in_bf16_uses_it_and_stays_close_to_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.preset("1M", vocab_size=300))
    ids = torch.randint(0, 300, (2, 100))
    calls = []
    real = attention._blocks
    monkeypatch.setattr(attention, "_blocks", lambda length: calls.append(length) or real(length))
    losses, gradients = [], []
    for precision in Precision:
        network.zero_grad()
        with precision.autocast(torch.device("cpu")):
            loss = network.loss(ids, ids.roll(-1, 1))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert bool(calls) == (precision is Precision.BF16)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999
