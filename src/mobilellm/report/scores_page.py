"""The page of task scores, a table a size with bars and error bars, and the files of all formats.

write_tables(Path("scores"), rows)         # scores/table.md, table.csv, table.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from mobilellm.files import write_file
from mobilellm.report import frame
from mobilellm.report.chart import EMPTY
from mobilellm.report.score_table import (
    Row,
    as_csv,
    cell,
    columns,
    groups,
    markdown,
    numbered_sources,
)

BAR = Markup(
    '<svg viewBox="0 0 100 8" preserveAspectRatio="none"><rect width="{:.1f}" height="8"/>{}</svg>'
)
ERROR_BAR = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="4" y2="4"/>')


def bar(row: Row, name: str) -> Markup:
    """A bar from 0 to 100 % with its error bar, one standard error to each side."""
    value = row.value(name)
    if value is None:
        return EMPTY
    error = row.errors.get(name, 0.0)
    return BAR.format(value, ERROR_BAR.format(value - error, value + error) if error else EMPTY)


def page(rows: Sequence[Row], title: str = "Zero-shot scores") -> str:
    """The whole page; it needs no network."""
    names = columns(rows) | {"average": "average"}
    return frame.page(
        "scores.html.j2",
        kind="mobilellm scores",
        title=title,
        wide=True,
        headings=list(names.values()),
        sources=numbered_sources(rows),
        groups=[
            (
                group,
                [(row, [(cell(row, name), bar(row, name)) for name in names]) for row in members],
            )
            for group, members in groups(rows)
        ],
    )


def write_tables(folder: Path, rows: Sequence[Row]) -> None:
    """table.md, table.csv and table.html in `folder`."""
    for name, content in (
        ("table.md", markdown(rows)),
        ("table.csv", as_csv(rows)),
        ("table.html", page(rows)),
    ):
        write_file(folder / name, content.encode("utf-8", "replace"))
