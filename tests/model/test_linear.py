"""The product by oneDNN is F.linear, and is left alone where gradients, other precisions or the
compiler are at work."""

import platform

import pytest
import torch
import torch.nn.functional as F

from mobilellm.model import linear as module
from mobilellm.model.linear import Linear, linear, onednn_linear


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    product, seen = onednn_linear(), []
    if product is None:
        pytest.skip("no oneDNN here")

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return product(x, *rest)

    monkeypatch.setattr(module, "onednn_linear", lambda: counted)
    return seen


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (2, 65, 24), (0, 24)])
def test_it_is_the_same_product(shape: tuple[int, ...], calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(shape), torch.randn(40, 24)
    for rows in (weight, weight[8:16], weight[::2], torch.randn(24, 40).t()):
        with torch.no_grad():
            torch.testing.assert_close(linear(x, rows), F.linear(x, rows), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        turned = torch.randn(24, 7).t()
        torch.testing.assert_close(
            linear(turned, weight), F.linear(turned, weight), rtol=1e-5, atol=1e-5
        )
    # a single row is a product with a vector, unless it comes transposed
    assert len(calls) == (1 if shape == (1, 24) else 5)


def test_training_and_other_precisions_keep_torchs_own(calls: list[tuple[int, ...]]) -> None:
    layer, x = Linear(24, 40), torch.randn(7, 24)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert linear(x.double(), layer.weight.double()).dtype == torch.float64
        assert torch.compile(layer, backend="eager")(x).shape == (7, 40)
    assert not calls


def test_other_machines_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    onednn_linear.cache_clear()
    assert onednn_linear() is None
    monkeypatch.undo()
    onednn_linear.cache_clear()
