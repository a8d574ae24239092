"""Fixtures of the lab's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.labs import LAB

from mobilellm.lab import plan
from mobilellm.lab.cells import Cell
from mobilellm.workflows.run_time import RunTime


@pytest.fixture
def lab_file(tmp_path: Path) -> Path:
    """The lab's file."""
    path = tmp_path / "depth.toml"
    path.write_text(LAB)
    return path


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells take a time that does not depend on what else the machine does: 5 ms a layer and
    step."""

    def time_of(cell: Cell, *_: object) -> RunTime:
        layers = cell.config.num_hidden_layers * cell.config.layer_repeats
        return RunTime(step=0.005 * layers, update=0.002, evaluation=0.005, start=0.02)

    monkeypatch.setattr(plan, "measure_cell", time_of)
