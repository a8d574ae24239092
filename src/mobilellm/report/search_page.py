"""The page of a search: candidates by quality, time and size, and how far the prediction is off.

write_search_page(Path("report.html"), result)      # of mobilellm.lab.search
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.report.chart import Line, Point, line_chart
from mobilellm.report.figures import MISSING, count, fixed, is_finite, percent
from mobilellm.report.frame import write_page
from mobilellm.report.run_files import mapping


def write_search_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a `SearchResult`."""
    shapes, limits = result["candidates"], mapping(result["limits"])
    error = f"{percent(result['error'])} on average, {percent(result['worst'])} at most"
    write_page(
        path,
        "search.html.j2",
        kind="mobilellm search",
        title=f"Shapes for {result['device']}",
        result=result,
        charts=[
            pareto(shapes, "milliseconds", "milliseconds a token, predicted"),
            pareto(shapes, "megabytes", "megabytes"),
        ],
        head=[
            "shape", "parameters", "ms a token, predicted", "MB",
            *(f"bits a byte, rung {n}" for n, _ in enumerate(result["steps"], 1)),
        ],
        rows=[row(shape, len(result["steps"])) for shape in shapes],
        facts=[
            ("winner", result["winner"]),
            ("its recipe", result["recipe"]),
            ("runtime", result["runtime"]),
            ("limit, ms a token", limits.get("milliseconds")),
            ("limit, MB", limits.get("megabytes")),
            ("prediction of unseen files is off by", error),
            ("steps of the rungs", ", ".join(map(str, result["steps"]))),
        ],
    )  # fmt: skip


def row(shape: Mapping[str, Any], rungs: int) -> list[str]:
    """A line of the table."""
    bits = list(shape["bits"])
    return [
        str(shape["name"]),
        count(mapping(shape["facts"]).get("parameters"), 4),
        fixed(shape["milliseconds"], 2),
        fixed(shape["megabytes"], 1),
        *(fixed(value, 4) for value in bits),
        *([MISSING] * (rungs - len(bits))),
    ]


def pareto(shapes: Sequence[Mapping[str, Any]], key: str, unit: str) -> Markup:
    """Quality after the first rung, in which all had the same steps, against a cost."""
    found: list[Point] = [
        (shape[key], shape["bits"][0])
        for shape in shapes
        if shape["bits"] and is_finite(shape[key]) and is_finite(shape["bits"][0])
    ]
    front = front_of(found)
    others = [point for point in found if point not in front]
    return line_chart(
        f"Bits a byte after the first rung against {key}",
        [
            Line("no other is better in both", front, "c1", marked=True),
            Line("others", others, "c2", marked=True, joined=False),
        ],
        unit,
        "bits a byte",
    )


def front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, by rising cost."""
    found: list[Point] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
