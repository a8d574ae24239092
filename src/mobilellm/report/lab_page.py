"""The page of a lab: table, curves of all cells with bands over seeds, cost, and how sure it is.

    write_lab_page(Path("report.html"), table, curves)      # of mobilellm.lab.results

Names and titles are text of a file; the template escapes all of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.report.chart import EMPTY, Band, Line, Point, line_chart
from mobilellm.report.figures import MISSING, count, fixed, formatted, ratio
from mobilellm.report.frame import write_page
from mobilellm.report.run_files import mapping

Curve = list[Point]
COLORS = 5
HELD = {
    "parameters": "All cells have the same parameters, within 2 %.",
    "flops": "All cells are trained with the same FLOPs, within 2 %.",
    "time": "All cells are trained for the same time, within 2 % as planned.",
    "latency": "All cells take the same time a token on the device, within 2 % as predicted.",
}


def write_lab_page(
    path: Path, table: Mapping[str, Any], curves: Mapping[str, Sequence[Curve]]
) -> None:
    """Write the page of `table` (`LabTable`); `curves` are the held-out curves of each cell's
    runs."""
    write_page(
        path,
        "lab.html.j2",
        kind="mobilellm lab",
        title=table["title"],
        wide=True,
        table=table,
        unfinished=table["done"] != table["runs"],
        held=HELD.get(table["equal"], ""),
        columns=columns(table),
        rows=[row_cells(row, table) for row in table["rows"]],
        curves=[curve_chart(curves)],
        differences=difference_chart(table),
        facts=facts(table),
    )


def columns(table: Mapping[str, Any]) -> list[str]:
    """The head of the table."""
    found = ["cell", "layers", "width", "heads", "ffn", "parameters", "tokens"]
    for metric in table["metrics"]:
        found += [metric["name"], f"against {table['compare']}", "95 % interval"]
    if table["published"] is not None:
        found += ["published", f"published, against {table['compare']}"]
    return [*found, "minutes a run"]


def row_cells(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row as (text, class); what lies inside the noise has the class noise."""
    shape = row["facts"]
    layers = str(shape["layers"])
    if shape["executed_layers"] != shape["layers"]:
        layers = f"{layers} ({shape['executed_layers']} applied)"
    heads = f"{shape['heads']}/{shape['kv_heads']}"
    found = [(row["name"], ""), (layers, ""), (str(shape["hidden_size"]), ""), (heads, "")]
    found.append((str(shape["intermediate_size"]), ""))
    found += [(count(shape["parameters"], 4), ""), (count(shape["tokens"]), "")]
    for metric in table["metrics"]:
        found += metric_cells(row["metrics"].get(metric["key"]))
    if table["published"] is not None:
        own, less = row["published"], row["published_difference"]
        found.append((MISSING if own is None else formatted(own, "g"), ""))
        found.append((MISSING if less is None else formatted(less, "+.1f"), ""))
    seconds = row["seconds"]
    return [*found, (MISSING if seconds is None else fixed(ratio(seconds, 60), 1), "")]


def metric_cells(result: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Mean with its standard deviation, the paired difference and its interval."""
    if result is None:
        return [(MISSING, ""), (MISSING, ""), (MISSING, "")]
    spread = result["deviation"]
    mean = fixed(result["mean"], 4) + ("" if spread is None else f" ± {fixed(spread, 4)}")
    found = mapping(result["difference"])
    if not found:
        return [(mean, ""), (MISSING, ""), (MISSING, "")]
    shade = "noise" if found["in_noise"] else ""
    ends = MISSING
    if found["low"] is not None:
        ends = " to ".join(formatted(found[end], "+.4f") for end in ("low", "high"))
    return [(mean, ""), (formatted(found["mean"], "+.4f"), shade), (ends, shade)]


def curve_chart(curves: Mapping[str, Sequence[Curve]]) -> Markup:
    """Means over seeds with a band from the lowest to the highest, a line a cell."""
    lines, bands = [], []
    for number, (name, runs) in enumerate(curves.items()):
        color, dashed = f"c{number % COLORS + 1}", number >= COLORS
        by_tokens: dict[float, list[float]] = {}
        for run in runs:
            for tokens, bits in run:
                by_tokens.setdefault(tokens, []).append(bits)
        whole = {x: found for x, found in sorted(by_tokens.items()) if len(found) == len(runs)}
        points = [(x, statistics.fmean(found)) for x, found in whole.items()]
        lines.append(Line(name, points, color, dashed=dashed))
        if len(runs) > 1:
            bands.append(Band([(x, min(f), max(f)) for x, f in whole.items()], color))
    return line_chart("Held-out text while training", lines, "tokens", "bits a byte", bands=bands)


def difference_chart(table: Mapping[str, Any]) -> Markup:
    """What each cell differs by, with its interval, in the order of the table."""
    metric = table["metrics"][0]
    points, bands, zero = [], [], []
    for number, row in enumerate(table["rows"], 1):
        result = row["metrics"].get(metric["key"])
        if result is None:
            continue
        zero.append((float(number), 0.0))
        found = mapping(result["difference"])
        if not found:
            points.append((float(number), 0.0))
            bands.append((float(number), 0.0, 0.0))
        elif found["low"] is not None:
            points.append((float(number), found["mean"]))
            bands.append((float(number), found["low"], found["high"]))
    if len(points) < 2:
        return EMPTY
    return line_chart(
        f"Against {table['compare']}, with 95 % intervals",
        [Line("difference", points, "c1", marked=True), Line("none", zero, "c2", faint=True)],
        "row of the table",
        metric["name"],
        bands=[Band(bands, "c1")],
    )


def best_places(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a sweep: where each row is best along its axis, and how far that moves."""
    optima = table["optima"]
    if optima is None:
        return []
    found = []
    for name, place in optima["rows"].items():
        best, *seeds = (formatted(value, ".3g") for value in (place, *optima["by_seed"][name]))
        found.append((f"best {optima['axis']} of {name}", f"{best} (by seed {', '.join(seeds)})"))
    if optima["ratio"] is not None:
        found.append(("it moves by a factor of", fixed(optima["ratio"], 2)))
    elif len(found) > 1:
        found.append(("it moves by a factor of", f"{MISSING} (some are at an end of the axis)"))
    return found


def facts(table: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What it cost, and how sure it is."""
    noise, name = table["noise"], table["metrics"][0]["name"]
    found: list[tuple[str, object]] = [
        ("runs", f"{table['done']} of {table['runs']} finished"),
        ("seeds", f"{table['seeds']}, the same in all cells: first weights and data together"),
        ("training", f"{fixed(ratio(table['seconds'], 3600), 2)} hours of one process"),
        ("device", table["device"]),
        ("begun", table["date"]),
    ]
    found += best_places(table)
    if noise["deviation"] is not None:
        spread = fixed(noise["deviation"], 4)
        found.append(("noise of a run", f"{spread}, standard deviation of its {name}"))
    if noise["smallest_difference"] is not None:
        found.append(("smallest difference it shows", fixed(noise["smallest_difference"], 4)))
    return found
