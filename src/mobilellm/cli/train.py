"""`mobilellm train`: token shards to a model."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mobilellm.cli.terminal import count, duration, print_json, say
from mobilellm.errors import UserError
from mobilellm.train.recipe import (
    DataSection,
    EvalSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Recipe,
    StartSection,
    TrackSection,
    TrainSection,
)

if TYPE_CHECKING:
    from mobilellm.records import MetricsRow, Result
    from mobilellm.train.loop import Outcome, Trainer
    from mobilellm.train.rows import Watcher


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
    parallel: ParallelSection = field(default_factory=ParallelSection)
    eval: EvalSection = field(default_factory=EvalSection)
    track: TrackSection = field(default_factory=TrackSection)
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Train to the end or until stopped; 130 after Ctrl-C, 143 after SIGTERM, 75 after
        SIGUSR1."""
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
        from mobilellm.train import start
        from mobilellm.train.world import World

        run = self.out if self.resume in (None, "auto") else Path(str(self.resume))
        assert run is not None
        going_on = self.resume is not None and (
            self.resume != "auto" or (run / "recipe.toml").is_file()
        )
        with World.join(self.parallel.timeout) as world, watched(world.main) as watcher:
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
        """What was asked for: the whole recipe where a file was named, else the run's own with the
        given flags."""
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


def exit_status(outcome: Outcome) -> int:
    """0 when the run is at its end; 75 (try again later) after SIGUSR1, by which schedulers
    announce a time limit."""
    return (
        0
        if outcome.interrupted is None
        else {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}[outcome.interrupted]
    )


def conclude(outcome: Outcome, result: Result, json: bool) -> int:
    """Print how a run ended; returns the exit status."""
    if json:
        print_json(
            {"run": str(outcome.run), "step": outcome.step, "steps": outcome.steps, "tokens": outcome.tokens,
             "seconds": round(outcome.seconds, 3), "checkpoint": str(outcome.checkpoint), "interrupted": outcome.interrupted,
             "held_out": result.get("held_out")}
        )  # fmt: skip
    if outcome.interrupted:
        say(
            f"stopped by {outcome.interrupted} after step {outcome.step} of {outcome.steps}; saved {outcome.checkpoint}"
        )
        say(f"go on with: mobilellm train --resume {outcome.run}")
        return exit_status(outcome)
    if not json:
        held_out = result["held_out"]
        print(
            f"{outcome.steps} steps, {count(outcome.tokens)} tokens in {duration(outcome.seconds)}; held-out "
            f"{held_out['bits_per_byte']:.4f} bits a byte, perplexity {held_out['perplexity']:.2f}"
        )
        print(f"checkpoint {outcome.checkpoint}\nreport     {outcome.run / 'report.html'}")
    return 0


class watched:  # noqa: N801  (used as a context manager, like contextlib's)
    """The live view of a run: a bar and held-out scores on a terminal, lines elsewhere; nothing but
    in one process."""

    def __init__(self, main: bool = True) -> None:
        self.main = main

    def __enter__(self) -> Watcher:
        from mobilellm.train.rows import Watcher

        if not self.main:
            self.shown = None
            return Watcher()

        class Shown(Watcher):
            bar: Any = None
            task: Any = None
            steps, log_every = 0, 10

            def started(self, trainer: Trainer, step: int) -> None:
                recipe, train, world = trainer.recipe, trainer.recipe.train, trainer.world
                batching = trainer.step.batching
                self.steps, self.log_every = train.steps, train.log_every
                say(
                    f"training {count(trainer.costs.parameters['total'])} parameters for {train.steps} steps of "
                    f"{train.batch_tokens:,} tokens, {train.precision}, "
                    f"{'compiled' if train.compile == 'block' else 'eager'}"
                    + (f", from step {step}" if step else "")
                )
                if world.size > 1 or batching.passes > 1:
                    who = (
                        f"{world.size} processes ({recipe.parallel.kind})"
                        if world.size > 1
                        else "1 process"
                    )
                    say(
                        f"{who}, each {batching.passes} x {batching.micro_batch_size} sequences of "
                        f"{batching.sequence_length} tokens a step"
                    )
                if recipe.optimizer.reference_batch_tokens:
                    section = recipe.optimizer
                    say(
                        f"learning rate {section.learning_rate * recipe.learning_rate_factor:g}: {section.learning_rate:g} at "
                        f"{section.reference_batch_tokens:,} tokens a step, scaled by the batch ({section.batch_scaling})"
                    )
                if sys.stderr.isatty():
                    from rich.console import Console
                    from rich.progress import (
                        BarColumn,
                        Progress,
                        TextColumn,
                        TimeElapsedColumn,
                        TimeRemainingColumn,
                    )

                    self.bar = Progress(
                        TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(),
                        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"), TimeElapsedColumn(),
                        TextColumn("left"), TimeRemainingColumn(compact=True),
                        console=Console(stderr=True), transient=True,
                    )  # fmt: skip
                    self.task = self.bar.add_task(
                        "", total=train.steps, completed=step, loss="", rate=""
                    )
                    self.bar.start()

            def stepped(self, row: MetricsRow) -> None:
                if self.bar is not None:
                    self.bar.update(
                        self.task,
                        completed=row["step"],
                        loss=f"{row['loss']:.3f}",
                        rate=f"{row['tokens_per_second']:,.0f}",
                    )
                held_out = ""
                if "held_out_loss" in row:
                    held_out = f"  held-out {row['held_out_loss']:.4f} ({row['held_out_bits_per_byte']:.4f} bits a byte)"
                if held_out or (
                    self.bar is None
                    and (row["step"] % self.log_every == 0 or row["step"] == self.steps)
                ):
                    self.said(
                        f"step {row['step']:>6}  loss {row['loss']:.4f}{held_out}  lr {row['learning_rate']:.3g}  "
                        f"norm {row['grad_norm']:.3g}  {row['tokens_per_second']:,.0f} tokens/s  "
                        f"MFU {row['mfu_6n']:.1%} (6N) {row['mfu_palm']:.1%} (PaLM)"
                        + (f"  {row['skipped']} skipped" if row["skipped"] else "")
                    )

            def said(self, line: str) -> None:
                if self.bar is not None:
                    self.bar.console.print(line, highlight=False)
                else:
                    say(line)

        self.shown = Shown()
        return self.shown

    def __exit__(self, *_: object) -> None:
        if self.shown is not None and self.shown.bar is not None:
            self.shown.bar.stop()
