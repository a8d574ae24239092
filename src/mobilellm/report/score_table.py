"""Tables of task scores: Markdown, CSV, and a page with bars and error bars.

    rows = [*measured, *published_rows()]
    write_tables(Path("scores"), rows)         # scores/table.md, table.csv, table.html

A row is either published or measured here, and says which; a measured one carries protocol, harness and counts.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilellm.files import write_file
from mobilellm.report.published import COLUMNS, GROUPS, published
from mobilellm.report.style import STYLE

BARS = """
.scores{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.scores td,.scores th{padding:4px 8px;text-align:right}
.scores th:first-child,.scores td:first-child{text-align:left}.scores tr{border-bottom:1px solid var(--line)}
.scores svg{display:block;width:72px;height:8px}.scores .here{font-weight:600}
.scores rect{fill:var(--line)}.scores .here rect{fill:var(--own)}.scores line{stroke:var(--ink)}
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one model, in percent."""

    model: str
    values: dict[str, float]
    average: float
    source: str
    group: str = "measured here"
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors by task, in points; also of the "average"."""

    @property
    def measured(self) -> bool:
        """Whether it was measured here."""
        return self.group == "measured here"


def published_rows() -> list[Row]:
    """The original's five tables."""
    return [
        Row(model=row.model, values=row.values, average=row.average, source=f"published: {row.source}", group=row.group)
        for row in published()
    ]


def measured_row(model: str, scores: dict[str, dict[str, Any]]) -> Row:
    """A model's row of what `score_tasks` gives: `acc_norm` where the harness has it, else `acc`."""
    values, errors = {}, {}
    for name, score in scores.items():
        metric = "acc_norm" if "acc_norm" in score else "acc"
        if metric in score:
            values[name] = 100 * score[metric]
            if f"{metric}_stderr" in score:
                errors[name] = 100 * score[f"{metric}_stderr"]
    facts = next(iter(scores.values()))
    counts = sorted({f"{name} {score['split']}[{score['count']}]" for name, score in scores.items() if "split" in score})
    marks = [f"{name} ALTERED" for name, score in scores.items() if "altered" in score]
    source = f"measured here: protocol {facts['protocol']}, lm-eval {facts['harness']}, {', '.join([*counts, *marks])}"
    return Row(model=model, values=values, average=values.pop("average", float("nan")), source=source, errors=errors)


def columns(rows: Iterable[Row]) -> dict[str, str]:
    """Tasks of any row with their headings: those of the published tables first, in their order."""
    names = {name for row in rows for name in row.values}
    return {name: title for name, title in COLUMNS.items() if name in names} | {n: n for n in sorted(names - set(COLUMNS))}


def cell(row: Row, name: str) -> str:
    """A value with its standard error: "42.9 ±1.4"."""
    value = row.average if name == "average" else row.values.get(name)
    if value is None or value != value:
        return ""
    return f"{value:.1f}" + (f" ±{row.errors[name]:.1f}" if name in row.errors else "")


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by group: what was measured here in front, then the published sizes."""
    order = ["measured here", *GROUPS]
    return [(group, found) for group in order if (found := [row for row in rows if row.group == group])]


def markdown(rows: Sequence[Row]) -> str:
    """A table a group, every row with its source."""
    names = columns(rows)
    lines = []
    for group, members in groups(rows):
        lines += [f"**{group}**", "", "| model | " + " | ".join(names.values()) + " | average | source |"]
        lines.append("|---|" + "---:|" * (len(names) + 1) + "---|")
        lines += [
            f"| {row.model} | {' | '.join(cell(row, name) for name in [*names, 'average'])} | {row.source} |" for row in members
        ]
        lines.append("")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, with a column of standard errors beside each task's."""
    names = [*columns(rows), "average"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "model", *(part for name in names for part in (name, f"{name}_stderr")), "source"])
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
    line = f'<line x1="{value - error:.1f}" x2="{value + error:.1f}" y1="4" y2="4"/>' if error else ""
    return f'<svg viewBox="0 0 100 8" preserveAspectRatio="none"><rect width="{value:.1f}" height="8"/>{line}</svg>'


def page(rows: Sequence[Row], title: str = "Zero-shot scores") -> str:
    """The whole page; it needs no network."""
    names = columns(rows) | {"average": "average"}
    body = [f"<h1>{html.escape(title)}</h1>"]
    for group, members in groups(rows):
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in ["model", *names.values()])
        body.append(f'<h2>{html.escape(group)}</h2><table class="scores"><tr>{head}</tr>')
        for row in members:
            cells = "".join(f"<td>{cell(row, name)}{bar(row, name)}</td>" for name in names)
            mark = ' class="here"' if row.measured else ""
            body.append(f'<tr{mark} title="{html.escape(row.source)}"><td>{html.escape(row.model)}</td>{cells}</tr>')
        body.append("</table>")
    sources = "".join(f"<li>{html.escape(source)}</li>" for source in dict.fromkeys(row.source for row in rows))
    body.append(f"<h2>Sources</h2><ul>{sources}</ul>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}{BARS}</style><main>{''.join(body)}</main></html>\n"
    )


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """table.md, table.csv and table.html in `folder`."""
    for name, content in (("table.md", markdown(rows)), ("table.csv", as_csv(rows)), ("table.html", page(rows))):
        write_file(folder / name, content.encode())
