"""Muon's step by AMX: what optimizers/muon.py computes with torch, at every edge, and in a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobilellm.kernels import amx, muon_step
from mobilellm.kernels.muon_step import Moved, fault, step
from mobilellm.optimizers.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize

pytestmark = pytest.mark.skipif(bool(fault()), reason=fault())

# Upright and lying, edges of squares, blocks and panels; more matrices than threads.
SHAPES = [
    (1, 1), (1, 5), (5, 1), (16, 16), (32, 32), (33, 17), (17, 33), (40, 70), (100, 33), (64, 192),
    (192, 64), (200, 520), (520, 200),
]  # fmt: skip


def exact(moved: Moved) -> tuple[Tensor, Tensor]:
    """Momentum and weight behind a step, in float64."""
    gradient, momentum, weight = (
        t.double() for t in (moved.gradient, moved.momentum, moved.weight)
    )
    momentum = momentum.lerp(gradient, moved.amount)
    direction = momentum.lerp(gradient, moved.amount)
    (update,) = orthogonalize(direction[None])
    return momentum, weight * moved.kept - moved.scale * update


def matrices() -> list[Moved]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, shape in enumerate(SHAPES):
        gradient, momentum, weight = (torch.randn(shape, generator=generator) for _ in range(3))
        gradient *= torch.logspace(-3, 0, shape[1])  # singular values far from one another
        settings = {"amount": 0.05 + 0.01 * number, "kept": 1 - 0.1 * number / len(SHAPES)}
        found.append(Moved(gradient, momentum * 0.1, weight, scale=0.5 + number, **settings))
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Of what is left, to its size."""
    return float((one - other).norm() / other.norm())


def test_it_is_the_step_of_torch() -> None:
    given = matrices()
    wanted = [exact(each) for each in given]
    before = [each.weight.clone() for each in given]
    gradients = [each.gradient.clone() for each in given]
    step(given, COEFFICIENTS, ITERATIONS)
    for each, (momentum, weight), old, gradient in zip(
        given, wanted, before, gradients, strict=True
    ):
        torch.testing.assert_close(each.momentum.double(), momentum, rtol=1e-6, atol=1e-7)
        assert torch.equal(each.gradient, gradient)
        # bfloat16's rounding in five iterations, as torch has it too
        update = (old.double() * each.kept - weight) / each.scale
        assert distance((old.double() * each.kept - each.weight) / each.scale, update) < 0.05


def test_it_rounds_no_more_than_torch() -> None:
    given = [each for each in matrices() if min(each.weight.shape) > 16]
    ours, theirs = 0.0, 0.0
    for each in given:
        momentum, weight = exact(each)
        direction = momentum.lerp(each.gradient.double(), each.amount)
        (rounded,) = orthogonalize(direction.bfloat16()[None])
        update = (each.weight.double() * each.kept - weight) / each.scale
        theirs += distance(rounded.double(), update)
        old = each.weight.clone()
        step([each], COEFFICIENTS, ITERATIONS)
        ours += distance((old.double() * each.kept - each.weight) / each.scale, update)
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_size_of_a_gradient_does_not_matter(size: float) -> None:
    gradient = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)) * size
    weight = torch.zeros(40, 70)
    step([Moved(gradient, torch.zeros(40, 70), weight, 0.05, 1.0, 1.0)], COEFFICIENTS, ITERATIONS)
    values = torch.linalg.svdvals(weight)
    if size < 1e-7:  # what is divided by the least norm stays small
        assert values.max() < 0.1
    else:
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_no_gradient_only_decays() -> None:
    weight = torch.ones(48, 32)
    zeros = torch.zeros(48, 32)
    step([Moved(zeros, zeros.clone(), weight, 0.05, 0.75, 1.0)], COEFFICIENTS, ITERATIONS)
    assert torch.equal(weight, torch.full((48, 32), 0.75))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = matrices()
            step(given, COEFFICIENTS, ITERATIONS)
            found.append(given)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one.weight, two.weight)
            assert torch.equal(one.momentum, two.momentum)


def test_tensors_that_do_not_fit_are_refused() -> None:
    weight = torch.zeros(8, 6)
    for other in (torch.zeros(6, 8), torch.zeros(6, 8).t(), torch.zeros(8, 6).double()):
        with pytest.raises(RuntimeError, match=r"a matrix \(8, 6\) with"):
            step([Moved(other, weight.clone(), weight, 0.05, 1.0, 1.0)], COEFFICIENTS, 5)


def stepped(tiles: bool, skip: bool = False, **settings: object) -> tuple[Tensor, ...]:
    """Two parameters, one of them stacked, behind three steps."""
    torch.manual_seed(0)
    stacked, plain = (torch.nn.Parameter(torch.randn(size) * 0.02) for size in ((80, 32), (32, 64)))
    groups = [
        {"params": [stacked], "parts": [48, 16, 16], "lr": 0.03},
        {"params": [plain], "weight_decay": 0.2},
    ]
    optimizer = Muon(groups, lr=0.02, dtype=torch.bfloat16, tiles=tiles, **settings)  # type: ignore[arg-type]
    for number in range(3):
        for parameter in (stacked, plain):
            parameter.grad = torch.randn_like(parameter)
        optimizer.found_inf = torch.tensor(float(skip and number == 1))
        optimizer.step()
    momenta = (optimizer.state[p]["momentum"] for p in (stacked, plain))
    return (stacked.detach(), plain.detach(), *momenta)


@pytest.mark.parametrize("skip", [False, True])
def test_the_optimizer_takes_it(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = muon_step.step

    def counted(matrices: list[Moved], *rest: object) -> None:
        calls.append(len(matrices))
        real(matrices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(muon_step, "step", counted)
    theirs = stepped(False, skip)
    assert not calls
    ours = stepped(True, skip)
    assert calls == [4] * (2 if skip else 3)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert distance(one, other) < 0.02
    for one, other in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", [{"row_decay": 0.9}, {"cautious": True}], ids=str)
def test_what_it_does_not_do_is_torchs(settings: dict[str, object]) -> None:
    for one, other in zip(stepped(True, **settings), stepped(False, **settings), strict=True):
        assert torch.equal(one, other)


def test_machines_without_it_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    amx.amx_library.cache_clear()
    monkeypatch.setattr(amx, "processor", lambda: "flags : avx2")
    try:
        assert fault() == "this processor has no AMX"
    finally:
        amx.amx_library.cache_clear()
