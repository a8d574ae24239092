"""What a lab will take, before it begins: cells, tokens, hours, and what it can show.

    plan = make_plan(lab, Path("data/book"), seeds=3, budget=6 * 3600)
    plan.seconds, plan.runs

Every cell is measured by a few real steps of it; cells that differ in the learning rate alone are
measured together. Where the lab names no train.steps, the budget
decides them: all cells get as many as fit. Where the lab leaves open whether and what compiles,
long runs are measured compiled as well, and all cells do what is faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mobilellm.data.dataset import Data
from mobilellm.errors import UserError
from mobilellm.hardware.description import describe
from mobilellm.hardware.probes import compiler_works, pick_device
from mobilellm.intervals import smallest_difference
from mobilellm.kernels.products import Products
from mobilellm.lab.cells import Cell, Costs, cell_recipe, held_by_steps, solved_cells
from mobilellm.lab.lab_file import LabFile
from mobilellm.lab.shapes import Measure, parameters_of
from mobilellm.train.inputs import open_data
from mobilellm.train.resolve import resolve, resolve_products
from mobilellm.workflows.run_time import RunTime, measure_run

MIN_STEPS = 20
"""Of a cell whose steps come from the budget."""
BUDGET_SHARE = 0.92
"""Of the budget that is planned with: machines are not equally fast at all times."""
EVALUATIONS = 8
"""Of the held-out text during a run, where the lab does not say when."""
MAX_SEEDS = 1000
WORTH_COMPILING_SECONDS = 300.0
"""Of a cell's runs together, in the mean: compiling it takes 15 to 40 s, once."""
MIN_GAIN = 1.1
"""Of compiled steps of the cell that takes longest; else nothing is compiled."""
Times = Mapping[str, RunTime]
"""Of the cells, by their names."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell, and how long it takes."""

    cell: Cell
    time: RunTime

    @property
    def seconds(self) -> float:
        """Of one run of it."""
        return self.time.seconds(self.cell.recipe)


@dataclass(frozen=True, kw_only=True)
class LabPlan:
    """A lab that is ready to begin."""

    lab: LabFile
    planned: tuple[Planned, ...]
    seeds: int
    data_fingerprint: str
    device: str
    profile_device: str = ""
    """The device by whose profile shapes were held equal."""

    @property
    def runs(self) -> int:
        """Cells times seeds."""
        return len(self.planned) * self.seeds

    @property
    def seconds(self) -> float:
        """Of all runs, one after the other."""
        return self.seeds * sum(each.seconds for each in self.planned)

    @property
    def tokens(self) -> int:
        """Trained on in all runs together."""
        return self.seeds * sum(each.cell.recipe.tokens() for each in self.planned)

    @property
    def shows(self) -> float | None:
        """The smallest difference whose interval does not hold zero, in standard deviations of the
        paired differences; None for one seed."""
        return smallest_difference(1.0, self.seeds)


def make_plan(
    lab: LabFile,
    data: Path,
    seeds: int,
    budget: float | None = None,
    measure: Measure = parameters_of,
    progress: Callable[[float, float], None] = lambda done, total: None,
    profile_device: str = "",
) -> LabPlan:
    """Solve and measure all cells. `budget` in seconds; `measure` is what shapes hold equal.

    `UserError` for zero seeds, cells that cannot be held equal, and a budget that has no room for
    one cell.
    """
    if not 1 <= seeds <= MAX_SEEDS:
        raise UserError(f"seeds {seeds}: must be from 1 to {MAX_SEEDS}")
    opened = open_data(cell_recipe(lab, {}, data, "recipe"))
    named = "steps" in lab.recipe.get("train", {})
    if not named and budget is None:
        raise UserError(
            "neither train.steps nor a budget is given",
            hint="add --budget 2h, or --set train.steps=1000",
        )
    cells = solved_cells(lab, opened, measure)
    base = next(cell for cell in cells if cell.name == lab.base_name)
    choice = Choice(products=_products(base))

    taken: dict[tuple[str, str], RunTime] = {}

    def measured(choice: Choice, cell: Cell) -> RunTime:
        kind = alike_in_time(cell)
        if (kind, choice.compile) not in taken:
            eager = taken.get((kind, "off"))
            known = eager.evaluation if eager else None  # evaluations are not compiled
            time = measure_cell(_paced(lab, choice.of(cell)), opened, known)
            taken[kind, choice.compile] = time
        return taken[kind, choice.compile]

    def timed(choice: Choice) -> Times:
        found = {}
        for number, cell in enumerate(cells):
            progress(number, len(cells))
            found[cell.name] = measured(choice, cell)
        progress(len(cells), len(cells))
        return found

    def planned_with(times: Times, choice: Choice) -> tuple[Planned, ...]:
        chosen = [choice.of(cell) for cell in cells]
        if not named:
            assert budget is not None
            chosen = _fitted(lab, chosen, times, seeds, budget)
        if lab.equal in ("flops", "time"):
            chosen = held_by_steps(lab, chosen, _cost(lab, times))
        return tuple(Planned(cell=_paced(lab, cell), time=times[cell.name]) for cell in chosen)

    times = timed(choice)
    planned = planned_with(times, choice)
    if _worth_compiling(cells, planned, seeds):
        compiled = dataclasses.replace(choice, compile="block")
        slowest = max(planned, key=lambda each: each.seconds).cell.name
        longest = next(cell for cell in cells if cell.name == slowest)
        gain = times[slowest].step / measured(compiled, longest).step
        if gain > MIN_GAIN:
            faster = timed(compiled)
            with contextlib.suppress(UserError):  # a budget that compiling leaves no room in
                planned = _better(planned, planned_with(faster, compiled))
    last = max(planned, key=lambda each: each.seconds)
    if budget is not None and budget < last.seconds:
        raise UserError(
            f"the budget of {budget:,.0f} s is below one run of cell {last.cell.name!r}, "
            f"{last.seconds:,.0f} s",
            hint="raise --budget, or lower train.steps",
        )
    return LabPlan(
        lab=lab,
        planned=planned,
        seeds=seeds,
        data_fingerprint=opened.fingerprint,
        device=str(describe(pick_device())["device"]),
        profile_device=profile_device,
    )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What computes the cells where the lab leaves that open: the same for all of them and for all
    seeds, so that no difference comes of it."""

    compile: Literal["off", "block"] = "off"
    products: Products = "torch"

    def of(self, cell: Cell) -> Cell:
        """The cell with it, and with what follows from it and from the device."""
        recipe = cell.recipe
        if recipe.train.compile == "auto":
            recipe = recipe.replace("train", compile=self.compile)
        if recipe.train.products == "auto":
            recipe = recipe.replace("train", products=self.products)
        return dataclasses.replace(cell, recipe=resolve(recipe, pick_device()))


def measure_cell(cell: Cell, data: Data, evaluation: float | None = None) -> RunTime:
    """How long a run of a cell takes."""
    return measure_run(cell.recipe, data, evaluation)


def alike_in_time(cell: Cell) -> str:
    """What the time of a run depends on: all of its recipe but how large the learning rate is."""
    return repr(cell.recipe.replace("optimizer", learning_rate=1.0))


def _products(base: Cell) -> Products:
    """The library of float32 products that is fastest for the cell the others are compared with."""
    device = pick_device()
    recipe = resolve(base.recipe.replace("train", compile="off"), device)
    return resolve_products(recipe, base.config, device, 1)


def _worth_compiling(cells: list[Cell], planned: tuple[Planned, ...], seeds: int) -> bool:
    """Whether a cell leaves it open, runs are long enough, and the compiler works here."""
    seconds = seeds * statistics.mean(each.seconds for each in planned)
    return (
        any(cell.recipe.train.compile == "auto" for cell in cells)
        and seconds >= WORTH_COMPILING_SECONDS
        and compiler_works(pick_device())
    )


def _better(one: tuple[Planned, ...], other: tuple[Planned, ...]) -> tuple[Planned, ...]:
    """The plan that trains on more in the same time: `other` where it does, start included."""
    speeds = [
        sum(each.cell.recipe.tokens() for each in plan) / sum(each.seconds for each in plan)
        for plan in (one, other)
    ]
    return other if speeds[1] > speeds[0] else one


def _cost(lab: LabFile, times: Times) -> Costs:
    """Of a token, and of a step beside: what the number of steps holds equal."""
    if lab.equal == "flops":
        return lambda cell: (float(cell.flops_per_token), 0.0)
    return lambda cell: times[cell.name].costs(cell.recipe)


def _fitted(lab: LabFile, cells: list[Cell], times: Times, seeds: int, budget: float) -> list[Cell]:
    """The cells with as many steps as the budget has room for."""
    ratio = dict.fromkeys(times, 1.0)
    if lab.equal in ("flops", "time"):
        cost = _cost(lab, times)
        both = [(cell, *cost(cell)) for cell in cells]
        one = {c.name: token * c.recipe.train.batch_tokens + step for c, token, step in both}
        ratio = {name: one[lab.base_name] / value for name, value in one.items()}
    own = {name for name, settings in lab.cell_settings() if "train.steps" in settings}
    count = EVALUATIONS if lab.recipe.get("train", {}).get("evaluate_every", 1) else 1
    fixed = sum(time.start + count * time.evaluation for time in times.values())
    fixed += sum(times[c.name].training(c.recipe) for c in cells if c.name in own)
    each = sum(ratio[name] * time.step for name, time in times.items() if name not in own)
    if not each:
        return cells
    steps = int((BUDGET_SHARE * budget / seeds - fixed) / each)
    if steps < MIN_STEPS:
        least = seeds * (fixed + MIN_STEPS * each) / BUDGET_SHARE
        raise UserError(
            f"the budget of {budget:,.0f} s has no room for {MIN_STEPS} steps of {len(cells)} "
            f"cells x {seeds} seeds",
            hint=f"at least {least:,.0f} s are needed, or fewer cells or seeds",
        )
    return [
        cell if cell.name in own else cell.with_steps(max(1, round(steps * ratio[cell.name])))
        for cell in cells
    ]


def _paced(lab: LabFile, cell: Cell) -> Cell:
    """A cell with evaluations and warm-up that fit its steps, where the lab does not give them. A
    warm-up that it gives is cut to a third of the steps where the budget decides these."""
    steps = cell.recipe.train.steps
    recipe = cell.recipe
    if not lab.gives("train.evaluate_every"):
        recipe = recipe.replace("train", evaluate_every=max(1, -(-steps // EVALUATIONS)))
    if not lab.gives("train.log_every"):
        recipe = recipe.replace("train", log_every=max(1, min(50, steps // 10)))
    longest = None if lab.gives("train.steps") else 3  # the lab cannot know how many there are
    if not lab.gives("optimizer.warmup_steps"):
        longest = 10
    if longest is not None:
        warmup = min(recipe.optimizer.warmup_steps, max(1, steps // longest))
        recipe = recipe.replace("optimizer", warmup_steps=warmup)
    return dataclasses.replace(cell, recipe=recipe)


def plan_facts(plan: LabPlan) -> dict[str, Any]:
    """A plan as lab.json has it."""
    return {
        "seeds": plan.seeds,
        "device": plan.device,
        "profile_device": plan.profile_device,
        "data_fingerprint": plan.data_fingerprint,
        "cells": [
            {
                "name": each.cell.name,
                "slug": each.cell.slug,
                "recipe": each.cell.recipe.to_dict(),
                "facts": each.cell.facts(),
                "seconds": each.seconds,
            }
            for each in plan.planned
        ],
    }
