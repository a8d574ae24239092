"""The page about prepared data: document lengths, sources, frequent tokens, sample documents.

write_data_page(Path("data.html"), "book", figures)      # of mobilellm.data.stats.statistics
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.report.chart import EMPTY, bar_chart
from mobilellm.report.figures import is_finite
from mobilellm.report.frame import write_page


def write_data_page(path: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Write the page. The template escapes all text: documents are whatever was prepared."""
    write_page(
        path,
        "data.html.j2",
        kind="mobilellm data",
        title=name,
        figures=figures,
        histogram=histogram(figures["lengths"]),
    )


def histogram(lengths: Sequence[Mapping[str, Any]]) -> Markup:
    """Bars of the documents by their length in tokens, in doublings; empty without documents."""
    known = {row["from"]: row["documents"] for row in lengths if is_finite(row["from"])}
    if not known:
        return EMPTY
    rows, size = [], max(1, min(known))
    while size <= max(known):
        name = f"{size:,} to {2 * size - 1:,}" if size > 1 else "1"
        rows.append((name, known.get(size, 0), False))
        size *= 2
    return bar_chart(rows, "Training documents by their length in tokens", ",")
