"""Tables of task scores: Markdown, CSV, and a page with bars and error bars.

    rows = set_in(measured, published_rows())
    write_tables(Path("scores"), rows)         # scores/table.md, table.csv, table.html

A row is either published or measured here, and says which; a measured one carries protocol, harness and counts. Among published
rows it stands in front of those of its size.
"""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobilellm.files import write_file
from mobilellm.report.published import COLUMNS, GROUPS, published
from mobilellm.report.style import STYLE

BARS = """
.scores{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
main{max-width:1180px}.scores td,.scores th{padding:4px 8px;text-align:right;white-space:nowrap}.scores sup{color:var(--soft)}
.scores th:first-child,.scores td:first-child{text-align:left}.scores tr{border-bottom:1px solid var(--line)}
.scores svg{display:block;width:100%;min-width:56px;height:8px}.scores .here{font-weight:600}
.scores rect{fill:var(--line)}.scores .here rect{fill:var(--own)}.scores line{stroke:var(--ink)}
"""


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
    """A model's row of what `score_tasks` gives: `acc_norm` where the harness has it, else `acc`."""
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
    source = f"measured here: protocol {facts['protocol']}, lm-eval {facts['harness']}, {', '.join([*counts, *marks])}"
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
    """A value with its standard error: "42.9 ±1.4". An average of other than the published tables' tasks says of how many."""
    value = row.average if name == "average" else row.values.get(name)
    if value is None or value != value:
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


def markdown(rows: Sequence[Row]) -> str:
    """A table a group, its columns aligned, and the rows' sources as a numbered list behind them."""
    names = columns(rows)
    sources = {
        source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows), 1)
    }
    lines = []
    for group, members in groups(rows):
        cells = [["model", *names.values(), "average", "source"]]
        for row in members:
            kind = f"{HERE if row.measured else 'published'} ({sources[row.source]})"
            cells.append([row.model, *(cell(row, name) for name in [*names, "average"]), kind])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        text = (0, len(widths) - 1)  # to the left; numbers to the right
        padded = [
            "| " + " | ".join(c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]  # fmt: skip
        rule = (
            "|"
            + "|".join(
                "-" * (w + 2) if i in text else "-" * (w + 1) + ":" for i, w in enumerate(widths)
            )
            + "|"
        )
        lines += [
            f"**{group}**",
            "",
            padded[0] + " |",
            rule,
            *(line + " |" for line in padded[1:]),
            "",
        ]
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
            value = row.average if name == "average" else row.values.get(name)
            numbers += ["" if value is None or value != value else f"{value:.4g}"]
            numbers += [f"{row.errors[name]:.3g}" if name in row.errors else ""]
        writer.writerow([row.group, row.model, *numbers, row.source])
    return out.getvalue()


def bar(row: Row, name: str) -> str:
    """A bar from 0 to 100 % with its error bar (one standard error to each side)."""
    value = row.average if name == "average" else row.values.get(name)
    if value is None or value != value:
        return ""
    error = row.errors.get(name, 0.0)
    line = (
        f'<line x1="{value - error:.1f}" x2="{value + error:.1f}" y1="4" y2="4"/>' if error else ""
    )
    return f'<svg viewBox="0 0 100 8" preserveAspectRatio="none"><rect width="{value:.1f}" height="8"/>{line}</svg>'


def page(rows: Sequence[Row], title: str = "Zero-shot scores") -> str:
    """The whole page; it needs no network."""
    names = columns(rows) | {"average": "average"}
    sources = {
        source: number for number, source in enumerate(dict.fromkeys(row.source for row in rows), 1)
    }
    body = [f"<h1>{html.escape(title)}</h1>"]
    for group, members in groups(rows):
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in ["model", *names.values()])
        body.append(f'<h2>{html.escape(group)}</h2><table class="scores"><tr>{head}</tr>')
        for row in members:
            cells = "".join(f"<td>{cell(row, name)}{bar(row, name)}</td>" for name in names)
            mark = ' class="here"' if row.measured else ""
            body.append(
                f"<tr{mark}><td>{html.escape(row.model)} <sup>{sources[row.source]}</sup></td>{cells}</tr>"
            )
        body.append("</table>")
    listed = "".join(f"<li>{html.escape(source)}</li>" for source in sources)
    body.append(f"<h2>Sources</h2><ol>{listed}</ol>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{BARS}</style><main>{''.join(body)}</main></html>\n"
    )


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """table.md, table.csv and table.html in `folder`."""
    for name, content in (
        ("table.md", markdown(rows)),
        ("table.csv", as_csv(rows)),
        ("table.html", page(rows)),
    ):
        write_file(folder / name, content.encode())
