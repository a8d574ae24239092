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
from mobilellm.files import (
    disk_errors,
    locked,
    read_json,
    sweep_partial,
    write_file,
    write_json,
)
from mobilellm.recipe.recipe import Recipe
from mobilellm.records import MetricsRow, check_run, metrics_row

MAX_ENVIRONMENT = 1 << 20  # bytes of environment.json


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
    check_run(run)
    return Recipe.read(run / "recipe.toml")


def mend_environment(run: Path, environment: dict[str, Any]) -> str:
    """Write environment.json anew where it is missing, empty or cut; the damaged one is kept
    beside. Returns a line that says so, or an empty one.

    Nothing that is computed depends on it, so its loss is no reason to lose a run.
    """
    path = run / "environment.json"
    try:
        if isinstance(read_json(path, limit=MAX_ENVIRONMENT), dict):
            return ""
        fault = f"{path}: no JSON object"
    except UserError as error:
        fault = str(error)
    kept = f", the damaged one kept as {set_aside(path).name}" if path.is_file() else ""
    write_json(path, environment | {"rebuilt": now()})
    return f"{fault}; written anew of this machine{kept}"


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that a whole one can have its name; returns the new name."""
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    return aside


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

    def rewind(self, step: int) -> str:
        """Drop what was recorded after `step`, and lines that a kill or a full disk cut off.

        Returns a line that says so where a line before the last was damaged; the file as it was is
        then kept beside.
        """
        if not self.path.exists():
            return ""
        kept, broken, last_is_whole = [], 0, True
        with open(self.path, "rb") as file:
            for line in file:
                row = metrics_row(line)
                last_is_whole = row is not None and line.endswith(b"\n")
                broken += row is None
                if row is not None and row["step"] <= step:
                    kept.append(line if last_is_whole else line + b"\n")
        said = ""
        if broken > (not last_is_whole):
            aside = set_aside(self.path)
            said = f"{self.path}: {broken} damaged lines left out; kept as {aside.name}"
        write_file(self.path, b"".join(kept))
        return said

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
