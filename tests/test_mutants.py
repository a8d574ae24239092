"""The table of faults fits the source: each text to be replaced is there, once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.mutants import MUTANTS, SURVIVES, Mutant

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"training": ("train", "recipe", "optimizers"), "data": ("data",), "model": ("model",)}
ROOMS |= {"evaluation": ("evaluate", "tasks")}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_fault_can_be_planted(mutant: Mutant) -> None:
    for edit in mutant.edits:
        assert (ROOT / "src/mobilellm" / edit.file).read_text().count(edit.old) == 1, edit.old
        assert edit.old != edit.new
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or f"def {name.split('[')[0]}(" in text, test


def test_there_are_forty_faults() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40
    files = [edit.file for mutant in MUTANTS for edit in mutant.edits]
    for what, rooms in ROOMS.items():
        assert sum(file.split("/")[0] in rooms for file in files) >= 8, what
    assert set(SURVIVES) <= set(names)
    assert len(SURVIVES) <= 2
