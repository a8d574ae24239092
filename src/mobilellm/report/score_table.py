"""Tables of task scores as Markdown and CSV, the published ones with ours among them.

    rows = set_in(measured, published_rows())
    print(markdown(rows))

A row is either published or measured here, and says which; a measured one carries protocol, harness
and counts. Among published rows it stands first of those of its size.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mobilellm.report.published import COLUMNS, GROUPS, published

HERE = "measured here"
SIZES = dict(zip(GROUPS, (125e6, 350e6, 600e6, 1e9, 1.5e9), strict=True))


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one model, in percent."""

    model: str
    values: dict[str, float]
    average: float
    source: str
    group: str = HERE
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors by task, in points; also of the "average"."""
    measured: bool = False
    """Whether it was measured here."""
    parameters: int = 0
    """Of a measured model."""

    def value(self, name: str) -> float | None:
        """Its score in a task, or the "average"; None where it has none."""
        value = self.average if name == "average" else self.values.get(name)
        return None if value is None or math.isnan(value) else value


def published_rows() -> list[Row]:
    """The original's five tables."""
    return [
        Row(
            model=row.model,
            values=row.values,
            average=row.average,
            source=f"published: {row.source}",
            group=row.group,
        )
        for row in published()
    ]


def set_in(measured: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Measured rows in the published table whose size is nearest (as a ratio) to theirs."""

    def nearest(row: Row) -> str:
        return min(SIZES, key=lambda group: abs(math.log(max(1, row.parameters) / SIZES[group])))

    return [*(replace(row, group=nearest(row)) for row in measured), *others]


def measured_row(model: str, scores: dict[str, dict[str, Any]], parameters: int = 0) -> Row:
    """A row of what `score_tasks` gives: `acc_norm` where the harness has it, else `acc`."""
    values, errors = {}, {}
    for name, score in scores.items():
        metric = "acc_norm" if "acc_norm" in score else "acc"
        if metric in score:
            values[name] = 100 * score[metric]
            if f"{metric}_stderr" in score:
                errors[name] = 100 * score[f"{metric}_stderr"]
    facts = next(iter(scores.values()))
    counts = sorted(
        {
            f"{name} {score['split']}[{score['count']}]"
            for name, score in scores.items()
            if "split" in score
        }
    )
    marks = [f"{name} ALTERED" for name, score in scores.items() if "altered" in score]
    made_by = f"protocol {facts['protocol']}, lm-eval {facts['harness']}"
    source = f"measured here: {made_by}, {', '.join([*counts, *marks])}"
    average = values.pop("average", float("nan"))
    return Row(
        model=model,
        values=values,
        average=average,
        source=source,
        errors=errors,
        measured=True,
        parameters=parameters,
    )


def columns(rows: Iterable[Row]) -> dict[str, str]:
    """Tasks of any row with their headings: those of the published tables first, in their order."""
    names = {name for row in rows for name in row.values}
    return {name: title for name, title in COLUMNS.items() if name in names} | {
        n: n for n in sorted(names - set(COLUMNS))
    }


def cell(row: Row, name: str) -> str:
    """A value with its standard error: "42.9 ±1.4". An average over other tasks than those of the
    published tables says over how many."""
    value = row.value(name)
    if value is None:
        return ""
    basis = (
        f" of {len(row.values)}"
        if name == "average" and row.values.keys() != COLUMNS.keys()
        else ""
    )
    return f"{value:.1f}" + (f" ±{row.errors[name]:.1f}" if name in row.errors else "") + basis


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by group: those of none in front, then the published sizes."""
    order = [HERE, *GROUPS]
    return [
        (group, found) for group in order if (found := [row for row in rows if row.group == group])
    ]


def numbered_sources(rows: Sequence[Row]) -> dict[str, int]:
    """Numbers from 1 on for the sources of the rows, in their order."""
    return {
        source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows), 1)
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table a group, its columns aligned, and after them the rows' sources as a numbered list."""
    names = columns(rows)
    sources = numbered_sources(rows)
    lines = []
    for group, members in groups(rows):
        cells = [["model", *names.values(), "average", "source"]]
        for row in members:
            kind = f"{HERE if row.measured else 'published'} ({sources[row.source]})"
            cells.append([row.model, *(cell(row, name) for name in [*names, "average"]), kind])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = (0, len(widths) - 1)  # to the left; numbers to the right
        padded = []
        for row_cells in cells:
            sized = enumerate(zip(row_cells, widths, strict=True))
            parts = (c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in sized)
            padded.append(f"| {' | '.join(parts)} |")
        rules = ("-" * (w + 2) if i in text else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        lines += [f"**{group}**", "", padded[0], f"|{'|'.join(rules)}|", *padded[1:], ""]
    return "\n".join(lines + [f"{number}. {source}" for source, number in sources.items()]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, with a column of standard errors beside each task's."""
    names = [*columns(rows), "average"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["group", "model", *(part for name in names for part in (name, f"{name}_stderr")), "source"]
    )
    for row in rows:
        numbers: list[str] = []
        for name in names:
            value = row.value(name)
            numbers += ["" if value is None else f"{value:.4g}"]
            numbers += [f"{row.errors[name]:.3g}" if name in row.errors else ""]
        writer.writerow([row.group, row.model, *numbers, row.source])
    return out.getvalue()
