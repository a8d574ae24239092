"""The run folder: a run documents itself, and can be gone on with from what lies there.

RUN/
  recipe.toml        every setting as resolved, loadable again
  environment.json   versions, device, git commit, data fingerprint
  metrics.jsonl      one object a step
  result.json        final figures, once the run has ended
  report.html        curves, final figures, samples
  checkpoints/step-00001000/
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.files import disk_errors, locked, sweep_partial, write_file, write_json
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def create(run: Path, recipe: Recipe, environment: dict[str, Any]) -> None:
    """Make the folder of a new run. `UserError` when it is there already."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        what = "holds another run" if (run / "recipe.toml").exists() else "exists and is not empty"
        raise UserError(
            f"{run}: {what}",
            hint=f"choose another --out, or go on with it: mobilellm train --resume {run}",
        )
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    write_json(run / "environment.json", environment)
    recipe.write(run / "recipe.toml")  # last: a folder with a recipe is a run


def read_recipe(run: Path) -> Recipe:
    """The resolved recipe of an existing run."""
    if not (run / "recipe.toml").is_file():
        raise UserError(
            f"{run}: no run here (no recipe.toml)",
            hint="give the folder that `mobilellm train --out` named",
        )
    return Recipe.read(run / "recipe.toml")


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """Hold the run for this process alone, and clear away what a killed one left half-written."""
    hint = "wait for it, or stop it"
    with disk_errors(run), locked(run / ".lock", run, "is training here", hint=hint):
        sweep_partial(run)
        sweep_partial(run / "checkpoints")
        yield


class Metrics:
    """metrics.jsonl, appended to; lines reach the disk at `sync`."""

    def __init__(self, run: Path) -> None:
        self.path = run / "metrics.jsonl"

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`, and a last line that a kill cut off."""
        if not self.path.exists():
            return
        kept = []
        with open(self.path, "rb") as file:
            for line in file:
                try:
                    row = orjson.loads(line)
                except orjson.JSONDecodeError:
                    break
                if row["step"] > step:
                    break
                kept.append(line)
        write_file(self.path, b"".join(kept))

    def append(self, rows: Sequence[MetricsRow]) -> None:
        """Add rows, one JSON object a line. Numbers that are not finite become null, as JSON has
        it."""
        with disk_errors(self.path), open(self.path, "ab") as file:
            file.write(
                b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
            )

    def sync(self) -> None:
        """Flush to the disk."""
        if self.path.exists():
            with disk_errors(self.path), open(self.path, "ab") as file:
                os.fsync(file.fileno())
