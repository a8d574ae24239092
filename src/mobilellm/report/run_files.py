"""What a run's folder says of the run; the run may be unfinished, killed, or of an older version.

run = RunFiles.read(Path("runs/demo"))
run.points("loss")                       # [(1, 6.93), (2, 6.81), ...]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.records import MetricsRow, Result, metrics_row
from mobilellm.report.chart import Point
from mobilellm.report.figures import is_finite


def read_metrics(path: Path) -> tuple[list[MetricsRow], int]:
    """The rows of metrics.jsonl, and how many lines could not be read: a kill cuts off the last."""
    rows: list[MetricsRow] = []
    broken = 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                row = metrics_row(line)
                if row is None:
                    broken += 1
                else:
                    rows.append(row)
    return rows, broken


def mapping(value: Any) -> Mapping[str, Any]:
    """A part of a result; empty where it is missing, or is something else."""
    return value if isinstance(value, dict) else {}


def points(rows: Sequence[MetricsRow], key: str, over: str = "step") -> list[Point]:
    """A curve: the rows in which both fields are finite numbers."""
    pairs = ((row.get(over), row.get(key)) for row in rows)
    return [(x, y) for x, y in pairs if is_finite(x) and is_finite(y)]  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one run; what is not there is empty."""

    path: Path
    rows: list[MetricsRow]
    broken: int
    """Lines of the metrics that could not be read."""
    result: Result
    environment: dict[str, Any]
    recipe: str
    damaged: list[str] = field(default_factory=list)
    """A line for each file that is there and could not be read."""

    @classmethod
    def read(cls, run: Path) -> RunFiles:
        """Read the folder `run`. A file that is there and is no JSON is named in `damaged`."""

        def json_file(name: str) -> dict[str, Any]:
            value: Any = {}
            try:
                value = read_json(run / name) if (run / name).is_file() else {}
            except UserError as error:
                damaged.append(str(error))
            return value if isinstance(value, dict) else {}

        damaged: list[str] = []

        rows, broken = read_metrics(run / "metrics.jsonl")
        recipe = run / "recipe.toml"
        return cls(
            path=run,
            rows=rows,
            broken=broken,
            result=cast("Result", json_file("result.json")),
            environment=json_file("environment.json"),
            recipe=recipe.read_text("utf-8", "replace") if recipe.is_file() else "",
            damaged=damaged,
        )

    @property
    def last(self) -> MetricsRow:
        """The last row, empty before the first step."""
        return self.rows[-1] if self.rows else {}

    def points(self, key: str, over: str = "step") -> list[Point]:
        """The curve of a field of the metrics."""
        return points(self.rows, key, over)
