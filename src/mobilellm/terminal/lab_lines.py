"""A lab on a terminal: its plan, its progress, and its table, grey where nothing can be told.

for line in plan_lines(plan):
    print(line)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mobilellm.lab.plan import LabPlan
from mobilellm.printable import one_line
from mobilellm.report.figures import MISSING, count, fixed
from mobilellm.report.lab_page import best_places
from mobilellm.terminal.output import aligned, duration

GREY, PLAIN = "\x1b[90m", "\x1b[0m"
EQUAL = {
    "": "nothing held equal",
    "parameters": "equal parameters",
    "flops": "equal FLOPs",
    "time": "equal time",
    "latency": "equal time a token on the device",
}


def plan_lines(plan: LabPlan) -> list[str]:
    """What a lab will take."""
    lab = plan.lab
    cells = [["cell", "layers", "width", "heads", "ffn", "parameters", "steps", "tokens", "a run"]]
    for each in plan.planned:
        facts, steps = each.cell.facts(), each.cell.recipe.train.steps
        cells.append(
            [
                one_line(each.cell.name),
                _layers(facts),
                str(facts["hidden_size"]),
                f"{facts['heads']}/{facts['kv_heads']}",
                str(facts["intermediate_size"]),
                count(facts["parameters"], 4),
                f"{steps:,}",
                count(facts["tokens"]),
                duration(each.seconds),
            ]
        )
    lines = [
        (
            f"{one_line(lab.title)}: {len(plan.planned)} cells x {plan.seeds} seeds, "
            f"{EQUAL[lab.equal]}, on {one_line(plan.device)}"
        ),
        "",
        *aligned(cells),
        "",
        (
            f"{plan.runs} runs, {count(plan.tokens)} tokens, about {duration(plan.seconds)} "
            f"of one process, {_computing(plan)}"
        ),
    ]
    if plan.shows is None:
        lines.append("one seed shows no noise: no difference can be told from it")
    else:
        lines.append(
            f"{plan.seeds} seeds show a difference from {plan.shows:.2f} times the standard "
            "deviation of paired differences on, which the first cells measure"
        )
    return lines


def _computing(plan: LabPlan) -> str:
    """The precisions of all cells, and whether blocks are compiled."""
    trains = [each.cell.recipe.train for each in plan.planned]
    precisions = " and ".join(sorted({train.precision for train in trains}))
    compiled = {train.compile for train in trains}
    how = (
        ", compiled" if compiled == {"block"} else ", some compiled" if "block" in compiled else ""
    )
    return f"in {precisions}{how}"


def table_lines(table: Mapping[str, Any], color: bool = False) -> list[str]:
    """The table; with `color` grey where an interval holds zero."""
    compare = one_line(table["compare"])
    head = ["cell", "layers", "width", "parameters", "tokens"]
    for metric in table["metrics"]:
        head += [one_line(metric["name"]), f"against {compare}", "95 % interval"]
    published = table["published"]
    head += [*(["published"] if published is not None else []), "minutes"]
    rows, grey = [head], [False]
    for row in table["rows"]:
        facts, seconds = row["facts"], row["seconds"]
        found = [one_line(row["name"]), _layers(facts), str(facts["hidden_size"])]
        found += [count(facts["parameters"], 4), count(facts["tokens"])]
        for metric in table["metrics"]:
            found += _metric(row["metrics"].get(metric["key"]))
        if published is not None:
            found.append(MISSING if row["published"] is None else f"{row['published']:g}")
        rows.append([*found, MISSING if seconds is None else fixed(seconds / 60, 1)])
        main = row["metrics"].get(table["metrics"][0]["key"])
        grey.append(bool(main and main["difference"] and main["difference"]["in_noise"]))
    lines = [
        f"{GREY}{line}{PLAIN}" if color and shade else line
        for line, shade in zip(aligned(rows), grey, strict=True)
    ]
    lines += ["", *_conclusions(table, any(grey) and color)]
    return lines


def _conclusions(table: Mapping[str, Any], grey: bool) -> list[str]:
    """What stands below the table."""
    noise, published, lines = table["noise"], table["published"], []
    if grey:
        lines.append("grey: inside the noise")
    if noise["smallest_difference"] is not None:
        lines.append(
            f"noise of a run {noise['deviation']:.4f}; a difference shows from "
            f"{noise['smallest_difference']:.4f} on"
        )
    if published is not None and published["correlation"] is not None:
        seeds = [value for value in published["by_seed"] if value is not None]
        spread = f" ({min(seeds):.2f} to {max(seeds):.2f} by seed)" if len(seeds) > 1 else ""
        lines.append(
            f"rank correlation with {one_line(published['source'])} over {published['cells']} "
            f"cells: {published['correlation']:.2f}{spread}"
        )
    for name, value in best_places(table):
        lines.append(f"{one_line(name)}: {value}")
    for name, why in table["left_out"].items():
        lines.append(f"left out: {one_line(name)}: {one_line(why)}")
    for run in table["failed"]:
        lines.append(f"failed: {one_line(run['cell'])}, seed {run['seed']}: "
                     f"{one_line(run['why'])}")  # fmt: skip
    if table["done"] < table["runs"]:
        lines.append(f"{table['done']} of {table['runs']} runs are finished")
    return lines


def _metric(result: Mapping[str, Any] | None) -> list[str]:
    if result is None:
        return [MISSING, MISSING, MISSING]
    spread = result["deviation"]
    mean = fixed(result["mean"], 4) + ("" if spread is None else f" ±{fixed(spread, 4)}")
    found = result["difference"]
    if found is None:
        return [mean, MISSING, MISSING]
    ends = MISSING
    if found["low"] is not None:
        ends = f"{found['low']:+.4f} {found['high']:+.4f}"
    return [mean, f"{found['mean']:+.4f}", ends]


def _layers(facts: Mapping[str, Any]) -> str:
    same = facts["executed_layers"] == facts["layers"]
    return f"{facts['layers']}" if same else f"{facts['layers']} ({facts['executed_layers']})"
