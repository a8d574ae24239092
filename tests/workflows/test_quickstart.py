"""The quickstart holds its minutes, or says at once that it cannot."""

import re
import time
from pathlib import Path

import pytest

from mobilellm.cli import main
from mobilellm.errors import UserError
from mobilellm.recipe.recipe import Recipe
from mobilellm.train import resolve
from mobilellm.workflows import quickstart

SPEED = 2e11
"""FLOP/s of a matrix product on the machine that these tests pretend to have."""


@pytest.fixture(autouse=True)
def _slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "peak_flops", lambda *_: SPEED)


def refusal(
    capsys: pytest.CaptureFixture[str], folder: Path, preset: str, minutes: str
) -> tuple[str, float]:
    """The line, and the seconds until it came."""
    start = time.perf_counter()
    arguments = ["--minutes", minutes, "--preset", preset, "--out", str(folder / "run")]
    with pytest.raises(SystemExit) as ended:
        main(["quickstart", *arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert not list(folder.iterdir())
    return err, time.perf_counter() - start


def test_a_size_too_large_for_the_time_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line, seconds = refusal(capsys, tmp_path, "125M", "0.3")
    assert "125M cannot be trained here in 0.3 minutes" in line
    assert seconds < 30
    minutes = float(re.findall(r"give --minutes ([\d.]+) or more", line)[0])
    assert 5 < minutes < 30  # 30 steps of 2,048 tokens, 0.7 GFLOP each, at a third of SPEED
    quickstart.fast_precision_for("125M", 2048, minutes * 60)  # the minutes it names are accepted


def test_a_size_too_large_for_the_memory_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quickstart, "total_memory", lambda _: 8e9)
    line, _ = refusal(capsys, tmp_path, "1.5B", "40000")
    assert re.search(r"training 1.5B takes [\d.]+ GB of memory, and this machine has 8.0 GB", line)
    assert "smaller --preset" in line


def test_a_measured_speed_decides_where_the_estimate_was_too_kind(small_data: Path) -> None:
    with pytest.raises(UserError, match=r"1M cannot be trained here in 0\.001 minutes"):
        quickstart.recipe_for(small_data, "1M", seconds=0.06, precision="fp32")


def test_the_steps_fit_the_time(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "measure", lambda *_, **__: 0.1)
    recipe = quickstart.recipe_for(small_data, "1M", seconds=4.0, precision="fp32")
    assert recipe.train.steps == 40
    assert recipe.train.compile == "off"  # compiling would take longer than the training


def test_scoring_takes_a_small_part_of_the_time(
    small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_seconds = 0.1
    monkeypatch.setattr(quickstart, "measure", lambda *_, **__: step_seconds)
    tokens = len(quickstart.TokenFolder.open(small_data).tokens("held_out"))
    score_seconds = step_seconds * tokens / quickstart.BATCH_TOKENS / 3
    monkeypatch.setattr(quickstart, "MAX_SCORING", 2.5 * score_seconds / 4.0)
    recipe = quickstart.recipe_for(small_data, "1M", seconds=4.0, precision="fp32")
    assert recipe.train.steps // recipe.train.evaluate_every == 2


def test_what_is_measured_is_what_will_run(
    small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "resolve_products", lambda *_: "onednn")
    measured: list[Recipe] = []

    def measure(recipe: Recipe, *_: object, **__: object) -> float:
        measured.append(recipe)
        return 0.1

    monkeypatch.setattr(quickstart, "measure", measure)
    recipe = quickstart.recipe_for(small_data, "1M", seconds=4.0, precision="fp32")
    for each in (*measured, recipe):
        assert (each.train.compile, each.train.products) == ("off", "onednn")
