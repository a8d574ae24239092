"""The chunked output layer and cross-entropy against the plain way."""

import pytest
import torch
import torch.nn.functional as F
from tests.plan.tracked import Tracked
from torch import Tensor

from mobilellm.model import loss as module
from mobilellm.model.config import ModelConfig
from mobilellm.model.loss import (
    IGNORED,
    NextToken,
    cross_entropy_chunk,
    linear_cross_entropy,
    output_walk,
)
from mobilellm.model.network import Network


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_without_a_target_value_and_gradients_are_exactly_zero(
    reduction: str, z_loss: float
) -> None:
    hidden, weight, targets = inputs()
    none = torch.full_like(targets, IGNORED)
    loss = linear_cross_entropy(hidden, weight, none, reduction, z_loss)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("chunk", [1 << 22, 1])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_rows_that_do_not_count_change_nothing(
    monkeypatch: pytest.MonkeyPatch, chunk: int, z_loss: float
) -> None:
    """Whatever stands in the rows without a target, value and gradients are those of the others."""
    monkeypatch.setattr(module, "CHUNK_NUMBERS", chunk)
    hidden, weight, targets = inputs()
    targets[40:80] = IGNORED  # with chunks of 16 rows, whole chunks in which no target counts
    counted = targets != IGNORED
    other = hidden.detach().clone()
    other[~counted] = 1e3 * torch.randn(int((~counted).sum()), hidden.shape[1])
    other.requires_grad_()
    ours = linear_cross_entropy(hidden, weight, targets, "sum", z_loss)
    theirs = linear_cross_entropy(other, weight, targets, "sum", z_loss)
    assert torch.equal(ours, theirs)
    mine = torch.autograd.grad(ours, (hidden, weight))
    changed = torch.autograd.grad(theirs, (other, weight))
    assert torch.equal(mine[0], changed[0])
    assert not mine[0][~counted].any()
    assert torch.equal(mine[1], changed[1])
    alone = linear_cross_entropy(hidden[counted], weight, targets[counted], "mean", z_loss)
    mean = linear_cross_entropy(hidden, weight, targets, "mean", z_loss)
    assert mean.item() == pytest.approx(alone.item(), rel=1e-6)


class TestOfANetwork:
    """The same through `Network.loss` and `NextToken`."""

    @staticmethod
    def network_and_rows() -> tuple[Network, Tensor, Tensor]:
        torch.manual_seed(0)
        network = Network(ModelConfig.preset("1M", vocab_size=256))
        ids = torch.randint(256, (3, 17))
        return network, ids[:, :-1], ids[:, 1:].clone()

    def test_an_objective_is_the_sum_of_the_networks_loss(self) -> None:
        network, x, y = self.network_and_rows()
        y[0, :5] = IGNORED
        documents = torch.arange(16).expand(3, -1) // 6
        for given in (None, documents):
            found = NextToken()(network, x, y, given)
            assert torch.equal(found, network.loss(x, y, "sum", given))
            assert found.item() / int((y != IGNORED).sum()) == pytest.approx(
                network.loss(x, y, documents=given).item(), rel=1e-6
            )

    def test_z_loss_reaches_the_gradient_alone(self) -> None:
        network, x, y = self.network_and_rows()
        plain, with_z = NextToken()(network, x, y), NextToken(z_loss=0.1)(network, x, y)
        assert torch.equal(plain, with_z)
        logits = network(x)
        z = 0.1 * logits.logsumexp(-1).square().sum()
        expected = torch.autograd.grad(plain, network.norm.weight)[0]
        expected += torch.autograd.grad(z, network.norm.weight)[0]
        found = torch.autograd.grad(with_z, network.norm.weight)[0]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_a_row_without_targets_is_as_if_it_were_not_there(self) -> None:
        network, x, y = self.network_and_rows()
        y[1] = IGNORED
        for reduction in ("mean", "sum"):
            loss = network.loss(x, y, reduction)
            alone = network.loss(x[[0, 2]], y[[0, 2]], reduction)
            assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
            found = torch.autograd.grad(loss, list(network.parameters()))
            expected = torch.autograd.grad(alone, list(network.parameters()))
            for mine, theirs in zip(found, expected, strict=True):
                assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert torch.equal(network.loss(x[[1]], y[[1]]), torch.zeros(()))


def test_another_objective_walks_over_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares of all logits, as a loss of its own: value, gradients, and each row once."""
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 40_000)
    hidden, weight, _ = inputs()
    seen: list[int] = []

    def squares(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        seen.extend(range(333)[rows])
        return logits.square().sum() / 2, logits if need_gradient else None

    ours = output_walk(hidden, weight, squares)
    assert seen == list(range(333))
    plain = (hidden @ weight.t()).square().sum() / 2
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    found = torch.autograd.grad(ours, (hidden, weight))
    for mine, theirs in zip(found, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_autocast_computes_in_its_precision() -> None:
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-2)
    assert ours.item() != plain.item()


@pytest.mark.parametrize("arrays", [1, 4])
def test_no_more_logits_are_in_memory_than_a_chunk_holds(
    arrays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of the chunk before beside them."""
    tokens, vocabulary, numbers = 4096, 16_384, 1 << 20
    monkeypatch.setattr("mobilellm.model.loss.CHUNK_NUMBERS", numbers)
    hidden, weight = (torch.randn(n, 2, requires_grad=True) for n in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,))
    with Tracked() as held:
        output_walk(hidden, weight, cross_entropy_chunk(targets), arrays).backward()
    chunk = numbers * 4 / arrays
    assert chunk <= held.peak < 1.5 * chunk + 4 * vocabulary * 2 * 4
