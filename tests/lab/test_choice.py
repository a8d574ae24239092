"""What computes a lab's cells where its file leaves that open: one choice for all of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mobilellm.data.dataset import Data
from mobilellm.errors import UserError
from mobilellm.hardware.probes import compiler_works
from mobilellm.kernels import bf16x6
from mobilellm.lab import plan as module
from mobilellm.lab.cells import Cell, cell_recipe, solved_cells
from mobilellm.lab.lab_file import read_lab
from mobilellm.lab.plan import Choice, LabPlan, make_plan
from mobilellm.lab.session import begin, go_on
from mobilellm.lab.work import work
from mobilellm.recipe.recipe import Recipe
from mobilellm.terminal.lab_lines import plan_lines
from mobilellm.train.inputs import open_data
from mobilellm.train.step import TrainStep
from mobilellm.workflows import run_time
from mobilellm.workflows.run_time import RunTime


class Stopwatch:
    """Measures in the place of the clock: 20 ms a layer and step, divided where it is compiled."""

    def __init__(self, gain: float, start: float = 0.02) -> None:
        self.gain, self.start, self.compiled, self.eager = gain, start, 0, 0
        self.evaluations: set[float | None] = set()

    def __call__(self, cell: Cell, data: Data, evaluation: float | None = None) -> RunTime:
        step = 0.02 * cell.config.num_hidden_layers
        if cell.recipe.train.compile == "block":
            self.compiled += 1
            self.evaluations.add(evaluation)
            step /= self.gain
            return RunTime(step=step, update=0.002, evaluation=0.005, start=self.start)
        self.eager += 1
        return RunTime(step=step, update=0.002, evaluation=0.005, start=0.02)


def settings(plan: LabPlan) -> set[tuple[str, str, str]]:
    """compile, attention and products of all cells."""
    trains = [each.cell.recipe.train for each in plan.planned]
    return {(each.compile, each.attention, each.products) for each in trains}


@pytest.fixture
def long_lab(lab_file: Path) -> Path:
    """The lab with its steps open, so that the budget decides them."""
    lab_file.write_text(lab_file.read_text().replace("steps = 12\n", ""))
    return lab_file


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that works."""
    monkeypatch.setattr(module, "compiler_works", lambda device: True)


@pytest.mark.usefixtures("compiler")
def test_long_runs_are_compiled_where_that_is_faster(
    long_lab: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, watch = read_lab(str(long_lab)), Stopwatch(gain=2.0)
    monkeypatch.setattr(module, "measure_cell", watch)
    plan = make_plan(lab, small_data, 1, budget=1800.0)
    assert {each[0] for each in settings(plan)} == {"block"}
    assert watch.compiled == 3, "the longest cell, and then the other two"
    assert watch.evaluations == {0.005}, "evaluations are not compiled: one measurement will do"
    assert plan.seconds <= 1800
    eager = make_plan(read_lab(str(long_lab), {"train.compile": "off"}), small_data, 1, 1800.0)
    steps = [each.planned[0].cell.recipe.train.steps for each in (plan, eager)]
    assert steps[0] == pytest.approx(2 * steps[1], rel=0.1), "the time that it saves is trained in"
    assert any("compiled" in line for line in plan_lines(plan))
    assert not any("compiled" in line for line in plan_lines(eager))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("watch", "budget", "tried"),
    [
        (Stopwatch(gain=1.05), 1800.0, 1),
        (Stopwatch(gain=2.0), 60.0, 0),
        (Stopwatch(gain=2.0, start=400.0), 1800.0, 3),
        (Stopwatch(gain=2.0, start=800.0), 1800.0, 3),
    ],
    ids=["no faster", "short runs", "long starts", "starts beyond the budget"],
)
def test_nothing_is_compiled_where_it_does_not_pay(
    long_lab: Path,
    small_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: Stopwatch,
    budget: float,
    tried: int,
) -> None:
    monkeypatch.setattr(module, "measure_cell", watch)
    plan = make_plan(read_lab(str(long_lab)), small_data, 1, budget)
    assert settings(plan) == {("off", "torch", "torch")}
    assert watch.compiled == tried


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("given", ["off", "block"])
def test_what_the_lab_says_stands(
    long_lab: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    watch = Stopwatch(gain=2.0 if given == "off" else 0.1)
    monkeypatch.setattr(module, "measure_cell", watch)
    lab = read_lab(str(long_lab), {"train.compile": given, "train.attention": "torch"})
    assert settings(make_plan(lab, small_data, 1, 1800.0)) == {(given, "torch", "torch")}


def test_cells_that_differ_in_the_rate_alone_are_measured_together(
    long_lab: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = long_lab.read_text().replace('compare = "3"', 'compare = "3/0.004"')
    text = text[: text.index("[published]")]
    axis = "num_hidden_layers = [2, 3, 6]\n"
    long_lab.write_text(text.replace(axis, f'{axis}"optimizer.learning_rate" = [0.004, 0.012]\n'))
    watch = Stopwatch(gain=1.0)
    monkeypatch.setattr(module, "measure_cell", watch)
    plan = make_plan(read_lab(str(long_lab), {"train.compile": "off"}), small_data, 1, 60.0)
    assert watch.eager == 3
    pairs = zip(plan.planned[::2], plan.planned[1::2], strict=True)
    assert all(one.time == other.time for one, other in pairs)
    assert len({each.time.step for each in plan.planned}) == 3


def test_products_are_measured_once_for_all_cells(
    lab_file: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, steady: None
) -> None:
    asked: list[int] = []

    def fastest(recipe: object, config: object, device: object, processes: int) -> str:
        asked.append(processes)
        return "onednn"

    monkeypatch.setattr(module, "resolve_products", fastest)
    assert settings(make_plan(read_lab(str(lab_file)), small_data, 1)) == {
        ("off", "torch", "onednn")
    }
    assert asked == [1]


def test_a_compiled_cell_is_compiled_before_it_is_measured(
    lab_file: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what its first step takes longer than others is a part of its start."""
    compiled: list[str] = []

    def compile_(recipe: Recipe, *_: object) -> None:
        compiled.append(recipe.train.compile)

    real, steps = TrainStep.forward_backward, iter(range(10_000))

    def slow_at_first(*given: Any) -> Any:
        if next(steps) == 0:
            time.sleep(0.5)
        return real(*given)

    monkeypatch.setattr(run_time, "_compile", compile_)
    lab = read_lab(str(lab_file))
    cell = solved_cells(lab, open_data(cell_recipe(lab, {}, small_data, "recipe")))[0]
    data = open_data(cell.recipe)
    off, block = (Choice(compile=way).of(cell) for way in ("off", "block"))
    usual = run_time.measure_run(off.recipe, data)
    assert not compiled
    monkeypatch.setattr(TrainStep, "forward_backward", slow_at_first)
    # Measured uncompiled, since the compiler's own time is not to be known.
    monkeypatch.setattr(run_time, "resolve", lambda recipe, _: recipe)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    found = run_time.measure_run(block.recipe, data)
    assert compiled == ["block"]
    assert usual.start + 0.3 < found.start


def test_a_machine_that_cannot_compute_alike_takes_no_run(
    tmp_path: Path, lab_file: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch, steady: None
) -> None:
    folder = begin(tmp_path / "lab", make_plan(read_lab(str(lab_file)), small_data, 1))
    plan = json.loads((folder.path / "lab.json").read_text())
    for cell in plan["cells"]:
        cell["recipe"]["train"]["products"] = "bf16x6"
    (folder.path / "lab.json").write_text(json.dumps(plan))
    monkeypatch.setattr(bf16x6, "fault", lambda: "this processor has no AMX")
    folder = go_on(folder.path, read_lab(str(lab_file)), None, None)
    with pytest.raises(UserError, match=r'cannot compute its runs: .*"bf16x6".* no AMX'):
        work(folder)
    assert len(folder.left()) == 3
    assert not any((folder.path / "failed").iterdir())


@pytest.mark.skipif(not compiler_works(torch.device("cpu")), reason="no C++ compiler that works")
def test_runs_stay_compiled_however_many_shapes_a_lab_has(
    tmp_path: Path, lab_file: Path, small_data: Path
) -> None:
    """torch's compiler gives up on a function of more than eight kinds of input (two here), and all
    cells are trained in one process."""
    text = lab_file.read_text().replace("steps = 12", "steps = 2").replace('"parameters"', '""')
    text = text.replace('compare = "3"', 'compare = "40"')
    text = text[: text.index("[shape]")]
    sizes = range(40, 56, 4)
    lab_file.write_text(f"{text}\n[axes]\nintermediate_size = {list(sizes)}\n")
    settings = {"train.compile": "block", "train.evaluate_every": 0, "num_hidden_layers": 1}
    with torch._dynamo.config.patch(recompile_limit=2):
        plan = make_plan(read_lab(str(lab_file), settings), small_data, 1)
        assert all(each.time.start > each.time.step for each in plan.planned)
        torch._dynamo.reset()
        counters.clear()
        assert work(begin(tmp_path / "lab", plan)).finished == len(sizes)
        assert counters["stats"]["unique_graphs"] >= len(sizes)
        assert counters["frames"]["ok"] == counters["frames"]["total"]
