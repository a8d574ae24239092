"""The chunked output layer and cross-entropy against the plain way."""

import pytest
import torch
import torch.nn.functional as F

from mobilellm.model import loss as module
from mobilellm.model.loss import linear_cross_entropy


def inputs(tokens: int = 333, width: int = 24, vocabulary: int = 1000):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1 << 22, 40_000, 1])
def test_value_and_gradients_equal_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, reduction: str, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    hidden, weight, targets = inputs()
    ours = linear_cross_entropy(hidden, weight, targets, reduction)
    gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max() + 1e-7


@pytest.mark.parametrize("chunk", [1 << 22, 40_000])
def test_z_loss_adds_its_gradient_and_leaves_the_value(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    hidden, weight, targets = inputs()
    ours = linear_cross_entropy(hidden, weight, targets, "sum", z_loss=0.01)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    logits = hidden @ weight.t()
    plain = F.cross_entropy(logits, targets, reduction="sum")
    z = 0.01 * (logits.logsumexp(1).square() * (targets != -100)).sum()
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(plain + z, (hidden, weight)), strict=True
    ):
        assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max() + 1e-7


def test_none_gives_each_token_its_loss() -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    assert torch.allclose(linear_cross_entropy(hidden, weight, targets, "none"), plain, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs()
    assert torch.isfinite(linear_cross_entropy(hidden * 1e4, weight, targets))


def test_no_targets_gives_zero() -> None:
    hidden, weight, targets = inputs()
    assert linear_cross_entropy(hidden, weight, torch.full_like(targets, -100)).item() == 0


def test_autocast_computes_in_its_precision() -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-2)
    assert ours.item() != plain.item()


def test_logits_are_never_whole_in_memory() -> None:
    """Peak allocation stays far below tokens x vocabulary floats."""
    tokens, vocabulary = 4096, 16_384
    hidden, weight = (
        torch.randn(tokens, 16, requires_grad=True),
        torch.randn(vocabulary, 16, requires_grad=True),
    )
    targets = torch.randint(0, vocabulary, (tokens,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, targets).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < tokens * vocabulary * 4 / 8
