"""The hand-written backward passes against autograd's."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mobilellm.model.fused import rms_norm, swiglu
from mobilellm.quantize.training import _RoundedActivations, on_grid


@pytest.mark.parametrize("shape", [(2, 5, 16), (7, 64)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) * 3).float().requires_grad_()
    weight = torch.randn(shape[-1]).requires_grad_()
    upstream = torch.randn(shape)
    ours, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, shape[-1:], weight, 1e-5)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for mine, their in zip(
        torch.autograd.grad(ours, (x, weight), upstream),
        torch.autograd.grad(theirs, (x, weight), upstream),
        strict=True,
    ):
        assert torch.allclose(mine, their, atol=3e-6)


def test_swiglu() -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 32) * 3).requires_grad_()
    upstream = torch.randn(3, 4, 16)
    gate, up = x.chunk(2, dim=-1)
    ours, theirs = swiglu(x), F.silu(gate) * up
    assert torch.allclose(ours, theirs, atol=1e-6)
    (mine,), (their,) = (
        torch.autograd.grad(ours, x, upstream),
        torch.autograd.grad(theirs, x, upstream),
    )
    assert torch.allclose(mine, their, atol=2e-6)


def test_they_keep_only_their_input() -> None:
    """Bytes saved for the backward pass, counted by hooks."""
    for function, inputs in (
        (swiglu, (torch.randn(100, 64, requires_grad=True),)),
        (
            rms_norm,
            (torch.randn(100, 64, requires_grad=True), torch.ones(64, requires_grad=True), 1e-5),
        ),
    ):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            function(*inputs)
        assert sum(saved) <= 100 * 64 + 64 + 100


def test_compiled_they_give_the_same_gradients() -> None:
    """torch 2.11 compiles a function whose last operation changes nothing to one whose gradients
    are 0."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 32), torch.randn(32)

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        function(*inputs).square().sum().backward()
        return [part.grad for part in inputs if part.grad is not None]

    for function in (
        lambda x, weight: rms_norm(x, weight, 1e-5),
        lambda x, weight: swiglu(x * weight),
        lambda x, weight: _RoundedActivations.apply(x) * weight,
        lambda x, weight: on_grid(weight.view(1, 32), 4) * x,
    ):
        plain = gradients(function)
        compiled = gradients(torch.compile(function, dynamic=False, backend="eager"))
        torch._dynamo.reset()
        for expected, found in zip(plain, compiled, strict=True):
            assert expected.any()
            assert torch.allclose(expected, found, rtol=1e-5, atol=1e-6)
