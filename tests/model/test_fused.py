"""The hand-written backward passes against autograd's."""

import pytest
import torch
import torch.nn.functional as F

from mobilellm.model.fused import rms_norm, swiglu


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
