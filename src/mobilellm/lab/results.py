"""The table of a lab: means over seeds, differences to the compared cell, and the paper's column.

    table = table_of(LabFolder.open(Path("labs/depth")), lab)
    table["rows"][0]["metrics"]["held_out.bits_per_byte"]["difference"]

The values come from the runs' own files, so that any figure of a result.json can be a column.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.intervals import (
    best_place,
    paired,
    rank_correlation,
    residual_deviation,
    smallest_difference,
)
from mobilellm.lab.folder import Job, LabFolder
from mobilellm.lab.lab_file import LabFile, MetricEntry
from mobilellm.report.run_files import read_metrics

LAST = "last/"
"""Before the name of a figure of the last evaluation in metrics.jsonl."""


class Difference(TypedDict):
    """A cell against the compared one, seed by seed."""

    mean: float
    low: float | None
    """None for a single seed, which has no interval."""
    high: float | None
    seeds: int
    in_noise: bool
    """Whether the interval holds zero, or there is none."""


class MetricResult(TypedDict):
    """A metric of a cell over its seeds."""

    mean: float
    deviation: float | None
    """Standard deviation over seeds; None for one."""
    values: dict[str, float]
    """Seed -> value."""
    difference: Difference | None
    """None for the compared cell itself, and where no seed has both."""


class RowResult(TypedDict):
    """A row of the table."""

    name: str
    facts: dict[str, Any]
    """Shape, parameters and tokens."""
    seconds: float | None
    """Mean of its runs."""
    metrics: dict[str, MetricResult]
    """By the metric's key; those of cells without a finished run are missing."""
    published: float | None
    published_difference: float | None


class Optima(TypedDict):
    """Where each row of a sweep is best: by the means over seeds, and by each seed."""

    axis: str
    rows: dict[str, float]
    by_seed: dict[str, list[float]]
    ratio: float | None
    """The largest over the smallest of the rows; None where one lies at an end of the axis."""


class LabTable(TypedDict):
    """A lab's results as table.json has them."""

    title: str
    about: str
    equal: str
    compare: str
    device: str
    date: str
    seeds: int
    metrics: list[dict[str, str]]
    rows: list[RowResult]
    published: dict[str, Any] | None
    """Source, column, the rank correlation of all means, and those of each seed."""
    left_out: dict[str, str]
    optima: Optima | None
    """Of a lab that asks for them, of rows whose cells all have a finished run."""
    noise: dict[str, float | None]
    """deviation: of a run, once cell and seed are taken away; smallest_difference: that it shows
    with all seeds."""
    failed: list[dict[str, Any]]
    done: int
    runs: int
    seconds: float
    """Of all finished runs."""


def metric_value(run: Path, key: str) -> float:
    """A figure of a finished run. `UserError` for one that it does not have."""
    found: Any
    if key.startswith(LAST):
        name = key[len(LAST) :]
        rows, _ = read_metrics(run / "metrics.jsonl")
        found = next((row[name] for row in reversed(rows) if name in row), None)  # type: ignore[literal-required]
    else:
        found = read_json(run / "result.json")
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        raise UserError(f"{run}: has no figure {key!r}", hint="correct metrics in the lab's file")
    return float(found)


def table_of(folder: LabFolder, lab: LabFile) -> LabTable:
    """The results so far."""
    jobs = folder.jobs()
    done = [job for job in jobs if folder.is_done(job)]
    values = {
        metric.key: {name: _values(folder, done, name, metric.key) for name in _names(folder.plan)}
        for metric in lab.metrics
    }
    main = lab.metrics[0]
    rows = [
        _row(cell, lab, values, [folder.seconds_of(j) for j in done if j.cell == cell["name"]])
        for cell in folder.plan["cells"]
    ]
    deviation = _deviation(list(values[main.key].values()))
    failures = [(job, folder.failure(job)) for job in jobs]
    return {
        "title": lab.title,
        "about": lab.about,
        "equal": lab.equal,
        "compare": lab.base_name,
        "device": folder.plan["device"],
        "date": folder.plan["date"],
        "seeds": folder.plan["seeds"],
        "metrics": [_metric(metric) for metric in lab.metrics],
        "rows": rows,
        "published": None if lab.published is None else _published(lab, values[main.key]),
        "left_out": lab.left_out,
        "optima": _optima(lab, values[main.key]) if lab.optimum else None,
        "noise": {
            "deviation": deviation,
            "smallest_difference": None
            if deviation is None
            else smallest_difference(deviation * 2**0.5, folder.plan["seeds"]),
        },
        "failed": [
            {"cell": job.cell, "seed": job.seed, "why": why}
            for job, why in failures
            if why is not None and not folder.is_done(job)
        ],
        "done": len(done),
        "runs": len(jobs),
        "seconds": sum(folder.seconds_of(job) for job in done),
    }


def _names(plan: Mapping[str, Any]) -> list[str]:
    return [cell["name"] for cell in plan["cells"]]


def _metric(metric: MetricEntry) -> dict[str, str]:
    return {"key": metric.key, "name": metric.name or metric.key, "better": metric.better}


def _values(folder: LabFolder, done: Sequence[Job], name: str, key: str) -> dict[int, float]:
    """Seed -> the metric, of a cell's finished runs."""
    mine = [job for job in done if job.cell == name]
    return {job.seed: metric_value(folder.run(job), key) for job in mine}


def _row(
    cell: Mapping[str, Any],
    lab: LabFile,
    values: Mapping[str, Mapping[str, dict[int, float]]],
    seconds: list[float],
) -> RowResult:
    name, base = cell["name"], lab.base_name
    metrics: dict[str, MetricResult] = {}
    for metric in lab.metrics:
        own = values[metric.key][name]
        if own:
            metrics[metric.key] = {
                "mean": statistics.fmean(own.values()),
                "deviation": statistics.stdev(own.values()) if len(own) > 1 else None,
                "values": {str(seed): value for seed, value in sorted(own.items())},
                "difference": None if name == base else difference(values[metric.key][base], own),
            }
    said = lab.published.values if lab.published is not None else {}
    mine, theirs = said.get(name), said.get(base)
    return {
        "name": name,
        "facts": cell["facts"],
        "seconds": statistics.fmean(seconds) if seconds else None,
        "metrics": metrics,
        "published": mine,
        "published_difference": None
        if mine is None or theirs is None or name == base
        else mine - theirs,
    }


def difference(base: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """`other` - `base` over the seeds that both have."""
    seeds = sorted(base.keys() & other.keys())
    if not seeds:
        return None
    found = paired([base[seed] for seed in seeds], [other[seed] for seed in seeds])
    alone = found.half is None
    return {
        "mean": found.mean,
        "low": None if alone else found.low,
        "high": None if alone else found.high,
        "seeds": found.count,
        "in_noise": found.holds_zero,
    }


def _deviation(cells: Sequence[Mapping[int, float]]) -> float | None:
    """The noise of one run, over the seeds that all cells with a finished run have."""
    cells = [cell for cell in cells if cell]
    seeds = sorted(set.intersection(*(set(cell) for cell in cells))) if cells else []
    return residual_deviation([[cell[seed] for seed in seeds] for cell in cells])


def _optima(lab: LabFile, values: Mapping[str, dict[int, float]]) -> Optima:
    """The best places along the last axis."""
    places = [float(place) for place in lab.axes[lab.optimum]]
    names = [name for name, _ in lab.cell_settings()]
    sign = 1.0 if lab.metrics[0].better == "lower" else -1.0
    best, by_seed = {}, {}
    for start in range(0, len(names), len(places)):
        cells = [values[name] for name in names[start : start + len(places)]]
        seeds = sorted(set.intersection(*map(set, cells)))
        if not seeds:
            continue
        row = names[start].rpartition("/")[0]
        found = [[sign * cell[seed] for cell in cells] for seed in seeds]
        best[row] = best_place(places, [statistics.fmean(of) for of in zip(*found, strict=True)])
        by_seed[row] = [best_place(places, scores) for scores in found]
    inside = all(min(places) < place < max(places) for place in best.values())
    ratio = max(best.values()) / min(best.values()) if inside and len(best) > 1 else None
    return {"axis": lab.optimum, "rows": best, "by_seed": by_seed, "ratio": ratio}


def _published(lab: LabFile, values: Mapping[str, dict[int, float]]) -> dict[str, Any]:
    """How the order of the cells compares with that of the paper's; 1 is the same order."""
    assert lab.published is not None
    said, main = lab.published, lab.metrics[0]
    sign = 1.0 if said.better == main.better else -1.0
    names = [name for name in said.values if values[name]]
    theirs = [said.values[name] for name in names]

    def correlation(ours: list[float]) -> float | None:
        return rank_correlation([sign * value for value in ours], theirs)

    seeds = sorted(set.intersection(*(set(values[name]) for name in names))) if names else []
    return {
        "source": said.source,
        "column": said.column,
        "better": said.better,
        "cells": len(names),
        "correlation": correlation([statistics.fmean(values[name].values()) for name in names]),
        "by_seed": [correlation([values[name][seed] for name in names]) for seed in seeds],
    }
