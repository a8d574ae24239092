"""A lab whose rows are swept along an axis, and whose runs are scored once more when rounded."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.lab.labs import LAB

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import held_out
from mobilellm.interop.load import load
from mobilellm.intervals import best_place
from mobilellm.lab.folder import LabFolder
from mobilellm.lab.lab_file import read_lab
from mobilellm.lab.plan import make_plan
from mobilellm.lab.session import begin, write_outputs
from mobilellm.lab.work import work
from mobilellm.model.precision import Precision
from mobilellm.quantize.activations import rounded_activations
from mobilellm.terminal.lab_lines import table_lines
from mobilellm.workflows.quantize import quantize

RATES = [1e-3, 3e-3, 3e-2]
SWEEP = (
    LAB.partition("[shape]")[0]
    .replace('equal = "parameters"\ncompare = "3"', 'quantized = ["w8a8"]\noptimum = "{optimum}"')
    .replace("steps = 12", "steps = 3")
    .replace("hidden_size = 32", "num_hidden_layers = 2, hidden_size = 32")
    + """
[axes]
num_hidden_layers = [1, 2]
"optimizer.learning_rate" = {rates}
[[metrics]]
key = "held_out.bits_per_byte"
[[metrics]]
key = "quantized.w8a8.bits_per_byte"
"""
)


def written(folder: Path, optimum: str = "optimizer.learning_rate", rates: Any = None) -> str:
    path = folder / "sweep.toml"
    text = SWEEP.replace("{optimum}", optimum).replace("{rates}", str(rates or RATES))
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> tuple[Path, Any]:
    """The lab's folder when all runs are finished, and its table."""
    folder = tmp_path_factory.mktemp("sweep")
    lab = read_lab(written(folder))
    made = begin(folder / "lab", make_plan(lab, small_data, 1))
    worked = work(made)
    assert (worked.finished, worked.failed) == (6, [])
    return folder, write_outputs(made, lab)


def test_each_row_has_the_place_where_it_is_best(swept: tuple[Path, Any]) -> None:
    folder, table = swept
    values = [row["metrics"]["held_out.bits_per_byte"]["mean"] for row in table["rows"]]
    optima = table["optima"]
    assert optima["axis"] == "optimizer.learning_rate"
    for number, row in enumerate(("1", "2")):
        scores = values[3 * number : 3 * number + 3]
        assert optima["rows"][row] == best_place(RATES, scores)
        assert optima["by_seed"][row] == [optima["rows"][row]]
    first, second = optima["rows"].values()
    inside = all(RATES[0] < place < RATES[-1] for place in (first, second))
    assert optima["ratio"] == (max(first, second) / min(first, second) if inside else None)
    lines = "\n".join(table_lines(table))
    assert f"best optimizer.learning_rate of 1: {first:.3g}" in lines
    assert f"it moves by a factor of: {optima['ratio'] or 0:.2f}" in lines or not inside
    assert "best optimizer.learning_rate of 2" in (folder / "lab/report.html").read_text()


def test_the_best_place_is_where_a_parabola_over_the_logarithm_is_lowest() -> None:
    def scores(best: float, places: list[float], sign: float = 1.0) -> list[float]:
        return [2 + sign * (math.log(place) - math.log(best)) ** 2 for place in places]

    assert best_place(RATES, scores(5e-3, RATES)) == pytest.approx(5e-3)
    four = [1.0, 2.0, 4.0, 8.0]
    assert best_place(four, scores(3.0, four)) == pytest.approx(3.0)
    assert best_place(RATES, scores(1.0, RATES)) == pytest.approx(3e-2)  # beyond the last one
    assert best_place(RATES, scores(4e-3, RATES, -1.0)) == RATES[2]  # a hill has no lowest place


def test_a_finished_run_is_scored_as_it_is_and_rounded(
    swept: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, table = swept
    made = LabFolder.open(folder / "lab")  # its runs are as they were when they were finished
    job = made.jobs()[0]
    result = json.loads((made.run(job) / "result.json").read_text())
    found = result["quantized"]
    data = TokenFolder.open(Path(job.recipe.data.path))

    def bits(network: Any) -> float:
        options = {"sequence_length": 32, "precision": Precision.FP32}
        return held_out(network, data, **options).bits_per_byte

    assert found["float"]["bits_per_byte"] == bits(load(made.run(job)).network)
    quantize(made.run(job), tmp_path / "rounded", scheme="w8a8", method="round", embedding="int8")
    rounded = load(tmp_path / "rounded")
    assert rounded.quantized is not None
    wanted = bits(rounded_activations(rounded.network, rounded.quantized))
    assert found["w8a8"]["bits_per_byte"] == pytest.approx(wanted, abs=1e-7)
    added = found["w8a8"]["bits_per_byte"] - found["float"]["bits_per_byte"]
    assert found["w8a8"]["added_bits_per_byte"] == added != 0
    shown = next(row for row in table["rows"] if row["name"] == job.cell)
    assert np.isclose(shown["metrics"]["quantized.w8a8.bits_per_byte"]["mean"], wanted)


@pytest.mark.parametrize(
    ("optimum", "rates", "what"),
    [
        ("num_hidden_layers", RATES, "must be the last of the axes"),
        ("optimizer.learning_rate", RATES[:2], "three or more numbers"),
        ("optimizer.learning_rate", [0.0, *RATES], "numbers above 0"),
    ],
)
def test_a_sweep_that_has_no_best_place_is_one_line(
    tmp_path: Path, optimum: str, rates: list[float], what: str
) -> None:
    with pytest.raises(UserError, match=what):
        read_lab(written(tmp_path, optimum, rates))


def test_an_unknown_scheme_is_named(tmp_path: Path) -> None:
    path = Path(written(tmp_path))
    path.write_text(path.read_text().replace('["w8a8"]', '["w8a9"]'))
    with pytest.raises(UserError, match="unknown scheme 'w8a9'; did you mean 'w8a8'"):
        read_lab(str(path))
