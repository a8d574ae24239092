"""A run in bfloat16 on a processor with AMX: what it takes, and that it gives the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.train.runs import StopAt, metrics, same

from mobilellm.kernels import bf16x6, muon_step, products
from mobilellm.kernels.products import products_fault
from mobilellm.model.loss import linear_cross_entropy
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.start import resume, train

pytestmark = pytest.mark.skipif(bool(products_fault("amx")), reason=products_fault("amx"))


@pytest.fixture
def bf16(recipe: Recipe) -> Recipe:
    """The run in bfloat16 by Muon, what computes it left open."""
    recipe = recipe.replace("train", precision="bf16", products="auto")
    return recipe.replace("optimizer", name="muon")


def test_a_run_in_bf16_takes_it_and_records_it(
    bf16: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = muon_step.step
    monkeypatch.setattr(muon_step, "step", lambda *given: (steps.append(1), real(*given))[1])
    train(tmp_path / "run", bf16)
    assert len(steps) == 24
    assert 'products = "amx"' in (tmp_path / "run/recipe.toml").read_text()
    train(tmp_path / "torch", bf16.replace("train", products="torch"))
    assert len(steps) == 24
    losses = [
        [row["loss"] for row in metrics(tmp_path / name) if "loss" in row]
        for name in ("run", "torch")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]


def test_interrupted_and_resumed_equals_undisturbed(bf16: Recipe, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", bf16)
    train(tmp_path / "run", bf16, StopAt(12))
    assert same(whole.checkpoint, resume(tmp_path / "run").checkpoint)


def test_the_output_layers_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, where torch adds up what it rounded in each."""
    torch.manual_seed(0)
    monkeypatch.setattr("mobilellm.model.loss.CHUNK_NUMBERS", 16 * 300)
    hidden, weight = torch.randn(100, 48), torch.randn(300, 48) * 0.2
    targets = torch.randint(0, 300, (100,))
    chunks: list[torch.dtype] = []
    real = bf16x6.multiply

    def counted(a: torch.Tensor, *rest: torch.Tensor, **more: object) -> torch.Tensor:
        chunks.append(a.dtype)
        return real(a, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(bf16x6, "multiply", counted)

    def gradient(kind: products.Products, dtype: torch.dtype) -> torch.Tensor:
        by = weight.to(dtype).requires_grad_()
        with products.using(kind), torch.autocast("cpu", torch.bfloat16, dtype != torch.float64):
            linear_cross_entropy(hidden.to(dtype), by, targets).backward()
        assert by.grad is not None
        return by.grad

    exact = gradient("torch", torch.float64)
    theirs = gradient("torch", torch.float32)
    assert not chunks
    ours = gradient("amx", torch.float32)
    assert chunks == [torch.bfloat16] * 7
    assert (ours - exact).norm() < 1.02 * (theirs - exact).norm()
