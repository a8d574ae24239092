"""`mobilellm lab`: ablations with paired seeds and intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Train the cells of a table with the same seeds, and say which differences are real.

    A lab is a TOML file, or a shipped one by name: the paper's tables (table1, table2, table10,
    table11, table13, table14, table15, table16), findings, rates. Cells are solved so that what is
    held equal is equal, and measured before anything begins. A lab that was stopped goes on with
    the same command, which may also be given in several terminals, or on machines that see one
    folder.

    Example: mobilellm lab table11 --data data/book --out labs/depth --budget 6h --seeds 3
    """

    lab: tyro.conf.Positional[str]
    """A lab's file, or the name of a shipped one."""
    out: Path | None = None
    """The lab's folder, to make or to go on with."""
    data: Path | None = None
    """A folder made by `mobilellm prepare`."""
    budget: str = ""
    """Time for all runs together (6h, 90min). Where the lab names no train.steps it decides them,
    and no run is begun that it has no room for."""
    seeds: int | None = None
    """Runs of each cell, 3 unless said otherwise; more may be added later."""
    set_: Annotated[dict[str, Any], tyro.conf.arg(name="set")] = field(default_factory=dict)
    """Settings over the lab's recipe: of the model (layer_repeats=2), or with a dot of the recipe
    (train.steps=500)."""
    profile: Path | None = None
    """With equal = "latency": the device profile."""
    runtime: str = ""
    """The runtime of that profile, where it has several."""
    plan: bool = False
    """Print the plan, or the table so far, and end."""
    yes: bool = False
    """Do not ask before it begins."""
    retry: bool = False
    """Try failed runs again."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """0 when all runs are finished, 1 when some failed or are left, 130 after Ctrl-C."""
        from mobilellm.terminal.lab_session import run_lab

        return run_lab(**vars(self))
