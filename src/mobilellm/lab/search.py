"""The best shape under a device's limits: candidates by a latency model, successive halving over
lab cells, a recipe for the winner.

    model = LatencyModel.fit(read_profile(Path("device/profile.json")))
    limits = Limits(milliseconds=20.0, megabytes=60.0)
    found = candidates(config, model, limits, rule, count=9)

Of all shapes on the grid only those at the limits are tried: of one depth, number of repeats and
grouping of heads the widest that fits, since more parameters at the same speed are better. Every
rung has the same time; a third of its candidates go on, for three times as many steps (eta = 3,
arXiv 1502.07943).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from mobilellm.errors import UserError
from mobilellm.files import write_json
from mobilellm.lab.cells import SHAPE_KEYS
from mobilellm.lab.folder import LabFolder
from mobilellm.lab.lab_file import BITS, CellEntry, LabFile
from mobilellm.lab.latency import LatencyModel
from mobilellm.lab.plan import LabPlan, make_plan
from mobilellm.lab.results import table_of
from mobilellm.lab.session import begin, go_on, write_outputs
from mobilellm.lab.shapes import WIDEST, ShapeRule, shaped
from mobilellm.lab.work import Listener, Worked, work
from mobilellm.model.config import ModelConfig
from mobilellm.report.search_page import write_search_page

DEPTHS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 30, 40, 54)
REPEATS = (1, 2)
GROUPS = (1, 3)
"""Query heads for a key/value head."""
ETA = 3
MIN_USED = 0.5
"""A candidate that uses less than this share of both limits is none: its depth leaves no room."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model may take on the device."""

    milliseconds: float
    """A token."""
    megabytes: float
    """Its file, in 10^6 bytes."""

    def used(self, config: ModelConfig, model: LatencyModel) -> float:
        """The larger of the shares of the limits that a shape takes; above 1 it does not fit."""
        slow = model.milliseconds(config) / self.milliseconds
        return max(slow, model.megabytes(config) / self.megabytes)


class Candidate(TypedDict):
    """A shape that was tried, as search.json has it."""

    name: str
    facts: dict[str, Any]
    milliseconds: float
    megabytes: float
    bits: list[float]
    """Held-out bits a byte after each rung that it was in."""


class SearchResult(TypedDict):
    """search.json."""

    device: str
    runtime: str
    limits: dict[str, float]
    error: float
    worst: float
    """Of the latency model, on files that its prices were not fitted to."""
    steps: list[int]
    """Of each rung."""
    candidates: list[Candidate]
    winner: str
    recipe: str
    """Path of the winner's recipe."""


def candidates(
    config: ModelConfig, model: LatencyModel, limits: Limits, rule: ShapeRule, count: int
) -> list[ModelConfig]:
    """At most `count` shapes at the limits, spread over all depths.

    `UserError` where not even the smallest shape fits.
    """
    found: list[ModelConfig] = []
    for depth in DEPTHS:
        for repeats in REPEATS:
            for group in GROUPS:
                own = dataclasses.replace(rule, query_heads_per_kv=group)
                base = dataclasses.replace(config, num_hidden_layers=depth, layer_repeats=repeats)
                best = _widest(base, model, limits, own)
                if best is not None and best not in found:
                    found.append(best)
    if not found:
        smallest = shaped(
            dataclasses.replace(config, num_hidden_layers=DEPTHS[0]), rule.head_dim, rule
        )
        raise UserError(
            f"no shape fits: the smallest takes {model.milliseconds(smallest):.3g} ms a token and "
            f"{model.megabytes(smallest):.3g} MB",
            hint="raise --max-latency or --max-size",
        )
    used = [limits.used(each, model) for each in found]
    near = [each for each, share in zip(found, used, strict=True) if share >= MIN_USED]
    near = near or [max(found, key=lambda each: limits.used(each, model))]
    if len(near) <= count:
        return near
    return [near[round(i * (len(near) - 1) / max(1, count - 1))] for i in range(count)]


def _widest(
    config: ModelConfig, model: LatencyModel, limits: Limits, rule: ShapeRule
) -> ModelConfig | None:
    """The widest network of this depth within the limits, or None."""
    best = None
    for heads in range(1, WIDEST):
        wider = shaped(config, heads * rule.head_dim, rule)
        if limits.used(wider, model) > 1:
            break
        best = wider
    return best


def name_of(config: ModelConfig) -> str:
    """A candidate's name: "12 layers x2, 192, 6/2 heads"."""
    times = f" x{config.layer_repeats}" if config.layer_repeats > 1 else ""
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads}"
    return f"{config.num_hidden_layers} layers{times}, {config.hidden_size}, {heads} heads"


def rungs(count: int) -> list[int]:
    """How many candidates each rung has: a third of those before, down to one that wins."""
    found = [count]
    while found[-1] > ETA:
        found.append(math.ceil(found[-1] / ETA))
    return found


def rung_lab(recipe: dict[str, Any], shapes: Sequence[ModelConfig]) -> LabFile:
    """A rung as a lab: a cell a shape, all of them trained alike."""
    keys = (*SHAPE_KEYS, "layer_repeats")
    return LabFile(
        title="Shapes for a device",
        about="Candidates of mobilellm search.",
        recipe=recipe,
        cells=tuple(
            CellEntry(name=name_of(shape), set_={key: getattr(shape, key) for key in keys})
            for shape in shapes
        ),
    )


def search(
    out: Path,
    recipe: dict[str, Any],
    data: Path,
    shapes: Sequence[ModelConfig],
    model: LatencyModel,
    limits: Limits,
    *,
    budget: float,
    seeds: int = 1,
    listener: Listener | None = None,
    planned: Callable[[int, LabPlan], None] = lambda rung, plan: None,
) -> SearchResult | Worked:
    """Successive halving over the shapes; writes search.json, report.html and winner.toml into
    `out`. Each rung is a lab of its own (`out`/rung-1, ...), and a search that was stopped goes on.

    Returns what was done instead when it was interrupted or runs of a rung failed altogether.
    """
    left, steps = list(shapes), []
    found = [
        Candidate(
            name=name_of(shape),
            facts={},
            milliseconds=model.milliseconds(shape),
            megabytes=model.megabytes(shape),
            bits=[],
        )
        for shape in shapes
    ]
    by_name = {each["name"]: each for each in found}
    sizes, last = rungs(len(shapes)), None
    for rung in range(1, len(sizes) + 1):
        folder_path = out / f"rung-{rung}"
        lab = rung_lab(recipe, left)
        if LabFolder.exists(folder_path):
            folder = go_on(folder_path, lab, None, None)
        else:
            plan = make_plan(lab, data, seeds, budget / len(sizes))
            planned(rung, plan)
            folder = begin(folder_path, plan)
        worked = work(folder, listener=listener)
        if worked.interrupted is not None:
            return worked
        write_outputs(folder, lab)
        rows = table_of(folder, lab)["rows"]
        scored = {row["name"]: row["metrics"][BITS]["mean"] for row in rows if row["metrics"]}
        if not scored:
            return worked
        for row in rows:
            by_name[row["name"]]["facts"] = row["facts"]
            if row["name"] in scored:
                by_name[row["name"]]["bits"].append(scored[row["name"]])
        steps.append(next(iter(folder.recipes.values())).train.steps)
        ranked = sorted(scored, key=lambda name: scored[name])
        left = [
            next(shape for shape in left if name_of(shape) == name)
            for name in ranked[: max(1, math.ceil(len(left) / ETA))]
        ]
        last = folder
    assert last is not None
    winner = name_of(left[0])
    slug = next(cell["slug"] for cell in last.plan["cells"] if cell["name"] == winner)
    # It is for any machine: what computes the candidates was chosen for this one.
    open_ = {"compile": "auto", "products": "auto", "attention": "auto"}
    last.recipes[slug].replace("train", **open_).write(out / "winner.toml")
    result: SearchResult = {
        "device": model.device,
        "runtime": model.runtime,
        "limits": dataclasses.asdict(limits),
        "error": model.error,
        "worst": model.worst,
        "steps": steps,
        "candidates": sorted(found, key=lambda each: (-len(each["bits"]), each["bits"][-1:])),
        "winner": winner,
        "recipe": str(out / "winner.toml"),
    }
    write_json(out / "search.json", result)
    write_search_page(out / "report.html", result)
    return result


def sample_shapes(config: ModelConfig, rule: ShapeRule) -> list[ModelConfig]:
    """Shapes to profile a device with: depths and widths apart, with and without repeats. The
    largest are as large as a search asks for, since weights behind the caches cost more."""
    found = []
    for depth, heads, repeats in (
        (2, 4, 1), (2, 10, 1), (6, 4, 1), (6, 8, 1), (6, 12, 1), (12, 4, 1), (12, 8, 1),
        (20, 3, 1), (20, 6, 1), (20, 9, 1), (20, 12, 1), (30, 4, 1), (30, 9, 1), (30, 12, 1),
        (6, 6, 2), (12, 5, 2), (20, 3, 2),
    ):  # fmt: skip
        base = dataclasses.replace(config, num_hidden_layers=depth, layer_repeats=repeats)
        found.append(shaped(base, heads * rule.head_dim, rule))
    return found


def write_shapes(folder: Path, shapes: Sequence[ModelConfig]) -> list[Path]:
    """A checkpoint of each shape, with random weights: what a token costs does not depend on
    them."""
    import torch

    from mobilellm.files import new_folder
    from mobilellm.interop.folder import save_checkpoint
    from mobilellm.model.network import Network

    paths = []
    for shape in shapes:
        times = f"x{shape.layer_repeats}" if shape.layer_repeats > 1 else ""
        path = folder / f"{shape.num_hidden_layers}{times}-{shape.hidden_size}"
        torch.manual_seed(0)
        with new_folder(path) as staging:
            origin = {"made_by": "mobilellm search --shapes", "weights": "random"}
            save_checkpoint(staging, Network(shape), None, origin)
        paths.append(path)
    return paths
