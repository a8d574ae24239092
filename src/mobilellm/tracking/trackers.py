"""Metrics to TensorBoard, trackio or Weights & Biases, by setting. What goes wrong there never ends
a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow

LEFT_OUT = {"step"}


class Trackers:
    """The trackers a recipe asks for. `UserError` at the start for one that is not installed."""

    def __init__(self, run: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.every, self.say = recipe.track.every, say
        self.sinks: dict[
            str, tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]
        ] = {}
        settings = recipe.to_dict()
        try:
            if recipe.track.tensorboard:
                self.sinks["tensorboard"] = _tensorboard(run, settings)
            if recipe.track.trackio:
                self.sinks["trackio"] = _trackio(recipe.track.trackio, run.name, settings)
            if recipe.track.wandb:
                self.sinks["wandb"] = _wandb(recipe.track.wandb, run, settings)
        except ModuleNotFoundError as error:
            raise UserError(
                f"track: {error.name} is not installed", hint="pip install 'mobilellm[track]'"
            ) from None

    def send(self, rows: Sequence[MetricsRow]) -> None:
        """The rows that are due: every few steps, and each with a held-out score."""
        for row in rows:
            if row["step"] % self.every and "held_out_loss" not in row:
                continue
            values = {
                k: float(v)
                for k, v in row.items()
                if isinstance(v, (int, float)) and k not in LEFT_OUT
            }
            for name, (log, _) in list(self.sinks.items()):
                self._try(name, lambda log=log, step=row["step"], values=values: log(step, values))  # type: ignore[misc]

    def close(self) -> None:
        """Let each finish its writing."""
        for name, (_, end) in list(self.sinks.items()):
            self._try(name, end)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's trouble, of whatever kind, is not the run's
            self.sinks.pop(name, None)
            self.say(f"{name} failed and is left out from now on: {error}")


def _tensorboard(run: Path, settings: dict[str, Any]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))
    writer.add_text(
        "recipe",
        "\n".join(
            f"    {s}.{k} = {v}" for s, values in settings.items() for k, v in values.items()
        ),
        0,
    )

    def log(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return log, writer.close


def _trackio(project: str, name: str, settings: dict[str, Any]) -> Any:
    import trackio

    trackio.init(project=project, name=name, config=settings, resume="allow")
    return (lambda step, values: trackio.log(values, step=step)), trackio.finish


def _wandb(project: str, run: Path, settings: dict[str, Any]) -> Any:
    import wandb

    session = wandb.init(
        project=project, name=run.name, dir=str(run), config=settings, resume="allow", id=run.name
    )
    return (lambda step, values: session.log(values, step=step)), session.finish
