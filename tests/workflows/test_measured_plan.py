"""A plan from steps made here counts the steps of the batch that was asked for."""

import itertools
import json

import pytest

from mobilellm.cli import main
from mobilellm.distributed.parallel import Parallel
from mobilellm.distributed.world import World
from mobilellm.model.network import Network
from mobilellm.recipe.recipe import Recipe
from mobilellm.train import resolve
from mobilellm.workflows import measured_plan


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    settings = ("--model", "1M", "--measure", "--sequence-length", "64", "--tokens", "1e6")
    with pytest.raises(SystemExit) as ended:
        main(["plan", *settings, *arguments, "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return json.loads(out)


def test_steps_are_of_the_batch_that_was_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_plan, "STEPS", 2)
    found = plan(capsys, "--batch-tokens", "2048", "--micro-batch-size", "4")
    assert found["batch_tokens"] == 2048
    assert found["steps"] == 489  # 1e6 / 2048, rounded up
    assert found["micro_batch_size"] == 4
    assert found["step_seconds"] * found["tokens_per_second"] == pytest.approx(2048)
    assert found["days"] == pytest.approx(1e6 / found["tokens_per_second"] / 86400)


def test_a_step_takes_the_time_of_all_its_micro_batches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(measured_plan.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measured_plan, "peak_flops", lambda *_: 1e11)
    found = plan(capsys, "--batch-tokens", "512", "--micro-batch-size", "2")
    assert found["step_seconds"] == 4 * 1 + 1  # four passes and an update, a tick each


def test_steps_are_computed_as_a_run_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    class Measured(Parallel):
        def __init__(self, network: Network, recipe: Recipe, world: World) -> None:
            kinds.append(recipe.train.products)
            super().__init__(network, recipe.replace("train", products="torch"), world)

    monkeypatch.setattr(resolve, "resolve_products", lambda *_: "onednn")
    monkeypatch.setattr(measured_plan, "Parallel", Measured)
    monkeypatch.setattr(measured_plan, "STEPS", 1)
    plan(capsys, "--batch-tokens", "64")
    assert kinds == ["onednn"]


def test_a_batch_that_does_not_divide_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "plan",
                "--measure",
                "--model",
                "1M",
                "--sequence-length",
                "64",
                "--batch-tokens",
                "1000",
            ]
        )
    assert ended.value.code == 2
    assert "does not divide by sequence_length" in capsys.readouterr().err
