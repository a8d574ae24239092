"""`mobilellm train`: tokens to a model, by a recipe.

    mobilellm train recipes/laptop.toml --data.path data/book --out runs/book

The flags are the recipe's fields; `mobilellm.cli.train_help` has the short help.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mobilellm.errors import UserError
from mobilellm.recipe.recipe import (
    DataSection,
    EvalSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Recipe,
    StartSection,
    TrackSection,
    TrainSection,
    TransferSection,
)
from mobilellm.recipe.tuning import (
    AverageSection,
    DistillSection,
    ObjectiveSection,
    QuantizeSection,
)
from mobilellm.terminal.run_end import conclude, exit_status

if TYPE_CHECKING:
    from mobilellm.records import Result


SECTIONS = [section.name for section in dataclasses.fields(Recipe)]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model from a recipe, or go on with a run that was stopped.

    Settings: defaults, then the recipe file, then these flags.

    Example: mobilellm train recipes/laptop.toml --data.path data/book --out runs/book
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """A recipe (TOML)."""
    out: Path | None = None
    """Run folder to make."""
    resume: str | None = None
    """Run folder to go on with, by its own recipe.toml; or "auto": go on with --out when there is a
    run, else begin it."""
    branch: Path | None = None
    """Checkpoint (or run) with a wsd schedule whose learning rate is let fall in a new run."""
    decay_steps: int = 0
    """Steps of that fall; 0 is what the branched recipe has."""
    allow_data_change: bool = False
    """Go on although the data are others than the checkpoint was trained on; they are read from
    their beginning."""
    model: ModelSection = field(default_factory=ModelSection)
    start: StartSection = field(default_factory=StartSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    transfer: TransferSection = field(default_factory=TransferSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    distill: DistillSection = field(default_factory=DistillSection)
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    average: AverageSection = field(default_factory=AverageSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    eval: EvalSection = field(default_factory=EvalSection)
    track: TrackSection = field(default_factory=TrackSection)
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Train to the end or until stopped.

        The exit status is 130 after Ctrl-C, 143 after SIGTERM, 75 after SIGUSR1.
        """
        recipe = Recipe(**{name: getattr(self, name) for name in SECTIONS})
        if self.resume not in (None, "auto") and (
            self.recipe is not None or self.out is not None or self.branch is not None
        ):
            raise UserError(
                "--resume RUN goes on with the run's own recipe",
                hint="give no recipe and no --out, or start a new run with --out alone",
            )
        if self.out is None and self.resume in (None, "auto"):
            raise UserError(
                "no folder for the run",
                hint="add --out runs/NAME (or --resume RUN to go on with one)",
            )
        if self.branch is not None and (
            self.recipe is not None or self.resume is not None or recipe != Recipe()
        ):
            raise UserError(
                "--branch takes the recipe of the run it starts from",
                hint="give --out and --decay-steps alone",
            )
        from mobilellm.distributed.world import World
        from mobilellm.terminal.live_view import live_view
        from mobilellm.train import start

        run = self.out if self.resume in (None, "auto") else Path(str(self.resume))
        assert run is not None
        going_on = self.resume is not None and (
            self.resume != "auto" or (run / "recipe.toml").is_file()
        )
        with World.join(self.parallel.timeout) as world, live_view(world.main) as watcher:
            if going_on:
                changes = None if recipe == Recipe() else self._changes(recipe, run)
                outcome = start.resume(run, watcher, world, changes, self.allow_data_change)
            elif self.branch is not None:
                outcome = start.branch(run, self.branch, watcher, world, self.decay_steps)
            else:
                outcome = start.train(run, recipe, watcher, world)
        if not world.main:
            return exit_status(outcome)
        result: Result = {}
        if outcome.interrupted is None:
            from mobilellm.workflows.finish import finish

            result = finish(outcome)
        return conclude(outcome, result, self.json)

    def _changes(self, recipe: Recipe, run: Path) -> Recipe:
        """The recipe file if one was named, else the run's own recipe with the given flags."""
        if self.recipe is not None:
            return recipe
        own, plain, given = (
            Recipe.read(run / "recipe.toml").to_dict(),
            Recipe().to_dict(),
            recipe.to_dict(),
        )
        for section, values in given.items():
            own[section] |= {
                key: value for key, value in values.items() if value != plain[section].get(key)
            }
        return Recipe.from_dict(own)


def from_recipe(arguments: list[str]) -> Train:
    """The verb with a recipe file's values as defaults, when the first argument names one."""
    if not arguments or arguments[0].startswith("-"):
        return Train()
    recipe = Recipe.read(Path(arguments[0]))
    return Train(recipe=Path(arguments[0]), **{name: getattr(recipe, name) for name in SECTIONS})
