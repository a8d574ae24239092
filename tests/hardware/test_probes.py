"""Probing: precision and compiler are measured, and what was found is what the recipe then says."""

import shutil

import pytest
import torch

from mobilellm.hardware import probes
from mobilellm.recipe.recipe import Recipe
from mobilellm.train import resolve as decisions
from mobilellm.train.resolve import resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("small", "large", "wanted"),
    [(0.003, None, False), (2.0, 4.0, True), (2.0, 1.2, False), (0.6, 4.0, True)],
)
def test_bf16_is_taken_only_where_it_is_well_faster(
    monkeypatch: pytest.MonkeyPatch, small: float, large: float | None, wanted: bool
) -> None:
    def speed(_: torch.device, dtype: torch.dtype, size: int, repeats: int = 7) -> float:
        ratio = small if size < 512 else large
        assert ratio is not None, (
            "a large product was tried where a small one had shown that bf16 is slow"
        )
        return ratio * 1e11 if dtype == torch.bfloat16 else 1e11

    monkeypatch.setattr(probes, "matmul_flops", speed)
    assert probes.bf16_is_fast(CPU) == wanted


def test_the_probe_agrees_with_itself() -> None:
    assert len({probes.bf16_is_fast(CPU) for _ in range(3)}) == 1


def test_without_a_compiler_a_run_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert not probes.compiler_works()
    resolved = resolve(Recipe(), CPU)
    assert resolved.train.compile == "off"
    assert resolved.train.precision in ("fp32", "bf16")


def test_short_runs_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "compiler_works", lambda _: pytest.fail("no need to try"))
    assert resolve(Recipe().replace("train", steps=10), CPU).train.compile == "off"


def test_what_is_given_is_kept() -> None:
    recipe = Recipe().replace("train", precision="fp32", compile="off", attention="torch")
    assert resolve(recipe, CPU) == recipe
