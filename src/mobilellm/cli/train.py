"""`mobilellm train`: token shards to a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mobilellm.cli.terminal import count, duration, print_json, say
from mobilellm.errors import UserError
from mobilellm.train.recipe import DataSection, ModelSection, OptimizerSection, Recipe, TrainSection

if TYPE_CHECKING:
    from mobilellm.train.loop import Outcome, Trainer, Watcher


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
    resume: Path | None = None
    """Run folder to go on with; its own recipe.toml holds, and no other setting may be given."""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Train to the end or until stopped; 130 after Ctrl-C, 143 after SIGTERM."""
        recipe = Recipe(model=self.model, data=self.data, train=self.train, optimizer=self.optimizer)
        if self.resume is not None:
            if self.recipe is not None or self.out is not None or recipe != Recipe():
                raise UserError(
                    "--resume goes on with the run's own recipe", mend="give no other setting, or start a new run with --out"
                )
        elif self.out is None:
            raise UserError("no folder for the run", mend="add --out runs/NAME (or --resume RUN to go on with one)")
        from mobilellm.train import loop

        with watched() as watcher:
            outcome = loop.resume(self.resume, watcher) if self.resume else loop.train(self.out or Path(), recipe, watcher)
        if outcome.interrupted is None:
            from mobilellm.train.result import finish

            result = finish(outcome)
        else:
            result = {}
        return conclude(outcome, result, self.json)


def from_recipe(arguments: list[str]) -> Train:
    """The verb with a recipe file's values as defaults, when the first argument names one."""
    if not arguments or arguments[0].startswith("-"):
        return Train()
    recipe = Recipe.read(Path(arguments[0]))
    return Train(recipe=Path(arguments[0]), model=recipe.model, data=recipe.data, train=recipe.train, optimizer=recipe.optimizer)


def conclude(outcome: Outcome, result: dict[str, Any], json: bool) -> int:
    """Print how a run ended; returns the exit status."""
    if json:
        print_json(
            {"run": str(outcome.run), "step": outcome.step, "steps": outcome.steps, "tokens": outcome.tokens,
             "seconds": round(outcome.seconds, 3), "checkpoint": str(outcome.checkpoint), "interrupted": outcome.interrupted,
             "held_out": result.get("held_out")}
        )  # fmt: skip
    if outcome.interrupted:
        say(f"stopped by {outcome.interrupted} after step {outcome.step} of {outcome.steps}; saved {outcome.checkpoint}")
        say(f"go on with: mobilellm train --resume {outcome.run}")
        return 143 if outcome.interrupted == "SIGTERM" else 130
    if not json:
        held_out = result["held_out"]
        print(
            f"{outcome.steps} steps, {count(outcome.tokens)} tokens in {duration(outcome.seconds)}; held-out "
            f"{held_out['bits_per_byte']:.4f} bits a byte, perplexity {held_out['perplexity']:.2f}"
        )
        print(f"checkpoint {outcome.checkpoint}\nreport     {outcome.run / 'report.html'}")
    return 0


class watched:  # noqa: N801  (used as a context manager, like contextlib's)
    """The live view of a run: a bar and held-out scores on a terminal, the scores alone elsewhere."""

    def __enter__(self) -> Watcher:
        from mobilellm.train.loop import Watcher

        class Shown(Watcher):
            bar: Any = None
            task: Any = None
            steps = 0

            def started(self, trainer: Trainer, step: int) -> None:
                train = trainer.recipe.train
                self.steps = train.steps
                say(
                    f"training {count(trainer.numbers.parameters['total'])} parameters for {train.steps} steps of "
                    f"{train.batch_tokens:,} tokens, {train.precision}, "
                    f"{'compiled' if train.compile == 'block' else 'eager'}" + (f", from step {step}" if step else "")
                )
                if sys.stderr.isatty():
                    from rich.console import Console
                    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

                    self.bar = Progress(
                        TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(),
                        TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"), TimeElapsedColumn(),
                        TextColumn("left"), TimeRemainingColumn(compact=True),
                        console=Console(stderr=True), transient=True,
                    )  # fmt: skip
                    self.task = self.bar.add_task("", total=train.steps, completed=step, loss="", rate="")
                    self.bar.start()

            def stepped(self, row: dict[str, Any]) -> None:
                if self.bar is not None:
                    self.bar.update(
                        self.task, completed=row["step"], loss=f"{row['loss']:.3f}", rate=f"{row['tokens_per_second']:,.0f}"
                    )
                if "held_out_loss" in row:
                    self.said(
                        f"step {row['step']:>6}  loss {row['loss']:.4f}  held-out {row['held_out_loss']:.4f} nats a token, "
                        f"{row['held_out_bits_per_byte']:.4f} bits a byte  {row['tokens_per_second']:,.0f} tokens/s"
                    )

            def said(self, line: str) -> None:
                if self.bar is not None:
                    self.bar.console.print(line, highlight=False)
                else:
                    say(line)

        self.shown = Shown()
        return self.shown

    def __exit__(self, *_: object) -> None:
        if self.shown.bar is not None:
            self.shown.bar.stop()
