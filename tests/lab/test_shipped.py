"""The shipped labs: each can be solved, holds equal what it says, and names its source."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mobilellm import cli
from mobilellm.lab.cells import Cell, solved_cells
from mobilellm.lab.lab_file import LabFile, labs_folder, read_lab, shipped
from mobilellm.lab.shapes import TOLERANCE

TABLES = [
    "table1", "table2", "table10", "table11", "table13", "table14", "table15", "table16",
]  # fmt: skip
OTHERS = ["findings", "rates"]
# A tokenizer of the size that `prepare` makes: shapes depend on nothing else of the data.
DATA: Any = SimpleNamespace(vocab_size=4096, bos_id=1, eos_id=2, path=Path("data"))
GIVEN = {"table16": {"distill.teacher": "runs/teacher"}}


def cells(name: str) -> tuple[LabFile, dict[str, Cell]]:
    lab = read_lab(name, GIVEN.get(name))
    return lab, {cell.name: cell for cell in solved_cells(lab, DATA)}


def test_all_are_listed() -> None:
    assert shipped() == TABLES + OTHERS
    assert {path.stem for path in labs_folder().iterdir()} == set(TABLES + OTHERS)


@pytest.mark.parametrize("name", TABLES + OTHERS)
def test_a_shipped_lab_can_be_solved(name: str) -> None:
    lab, found = cells(name)
    assert len({cell.slug for cell in found.values()}) == len(found) >= 2
    assert (lab.published is None) == (name in OTHERS)
    if lab.published is not None:
        assert set(lab.published.values) == set(found)
        assert "arXiv 2402.14905, Table " + name.removeprefix("table") in lab.published.source
    assert "steps" not in lab.recipe["train"]  # the budget decides
    sizes = {cell.name: cell.parameters for cell in found.values()}
    assert all((1e6 if lab.published else 2e5) < size < 8e6 for size in sizes.values()), sizes
    if lab.equal == "parameters":
        base = sizes[lab.base_name]
        assert all(abs(size / base - 1) <= TOLERANCE for size in sizes.values()), sizes


def test_cells_are_what_the_tables_say() -> None:
    _, found = cells("table2")
    assert {c.config.layer_order for c in found.values()} == {"immediate", "all_over", "reverse"}
    assert len({c.parameters for c in found.values()}) == 1
    _, found = cells("table14")
    assert [c.config.layer_repeats for c in found.values()] == [1, 2, 3, 4]
    _, found = cells("table13")
    for name, cell in found.items():
        config = cell.config
        assert name == f"{config.num_attention_heads}/{config.num_key_value_heads}"
        assert config.num_attention_heads * config.head_dim == config.hidden_size
    _, found = cells("table1")
    sizes = [cell.parameters for cell in found.values()]
    assert sizes[1] < sizes[2] <= sizes[0]
    _, found = cells("table11")
    for name, cell in found.items():
        assert cell.config.num_hidden_layers == int(name)
        assert cell.recipe.transfer.kind == "completep"
    _, found = cells("table10")
    sizes = [cell.parameters for cell in found.values()]
    assert found["ReLU, wide"].config.feed_forward == "relu"
    assert sizes[0] == sizes[1]
    assert sizes[4] == sizes[5]
    assert max(sizes) < 1.25 * min(sizes)
    lab, found = cells("rates")
    assert lab.optimum == "optimizer.learning_rate"
    assert {cell.recipe.transfer.kind for cell in found.values()} == {"completep"}
    lab, found = cells("table15")
    assert lab.quantized == ("w8a8",)
    small, shared, *_ = (cell.parameters for cell in found.values())
    assert small == shared


def test_a_setting_that_a_lab_needs_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["lab", "table16", "--out", str(tmp_path / "lab")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "needs distill.teacher; add --set distill.teacher=VALUE" in err
    assert len(err.splitlines()) == 1
