"""`mobilellm search` as a person sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.lab.lab_file import labs_folder
from mobilellm.lab.latency import LatencyModel
from mobilellm.lab.plan import LabPlan
from mobilellm.lab.search import Limits, name_of, sample_shapes, search, write_shapes
from mobilellm.lab.search import candidates as find_candidates
from mobilellm.lab.shapes import ShapeRule
from mobilellm.lab.work import Worked
from mobilellm.model.config import ModelConfig
from mobilellm.profiling.device_profile import read_profile
from mobilellm.recipe.recipe import DEFAULT_PRESET, Recipe
from mobilellm.recipe.settings import check_ranges
from mobilellm.terminal.amounts import amount_of, seconds_of
from mobilellm.terminal.lab_session import agreed
from mobilellm.terminal.lab_view import LabView
from mobilellm.terminal.output import aligned, duration, print_json, put, say
from mobilellm.terminal.run_end import EXIT_STATUS
from mobilellm.train.inputs import model_config, open_data

LAPTOP = "laptop.toml"


def run_search(
    *,
    device: Path | None,
    max_latency: str,
    max_size: str,
    data: Path | None,
    out: Path | None,
    budget: str,
    recipe: Path | None,
    runtime: str,
    candidates: int,
    seeds: int,
    head_dim: int,
    ffn_multiple: int,
    shapes: Path | None,
    preset: str,
    yes: bool,
    json: bool,
) -> int:
    """Find shapes within the limits, try them, and print the winner; returns the exit status. The
    arguments are the verb's flags."""
    rule = ShapeRule(head_dim=head_dim, ffn_multiple=ffn_multiple)
    check_ranges(rule, "--")
    if shapes is not None:
        return run_shapes(shapes, preset, rule)
    if device is None or data is None or out is None:
        raise UserError(
            "a search needs --device, --data and --out",
            hint="make a profile with `mobilellm search --shapes FOLDER` and `profile`",
        )
    if candidates < 1:
        raise UserError(f"candidates {candidates}: must be 1 or more")
    limits = Limits(
        milliseconds=amount_of("max-latency", max_latency, {"ms": 1, "s": 1000}),
        megabytes=amount_of("max-size", max_size, {"MB": 1, "GB": 1000}),
    )
    seconds = seconds_of(budget)
    model = LatencyModel.fit(read_profile(device), runtime, str(device))
    base = Recipe.read(recipe or labs_folder().parent / "recipes" / LAPTOP)
    base = base.replace("data", path=str(data.resolve()))
    config = model_config(base, open_data(base))
    tried = find_candidates(config, model, limits, rule, candidates)
    say(
        f"{model.runtime} on {model.device}: predictions of unseen files are off by "
        f"{model.error:.1%} on average, {model.worst:.1%} at most ({len(model.left_out)} files)"
    )
    cells = [["candidate", "ms a token", "MB"]]
    for shape in tried:
        cells.append([name_of(shape), f"{model.milliseconds(shape):.2f}",
                      f"{model.megabytes(shape):.1f}"])  # fmt: skip
    for line in aligned(cells):
        say(line)
    if not (yes or agreed()):
        say("nothing was begun")
        return 0
    values = base.to_dict()
    for key in ("steps", "evaluate_every"):
        del values["train"][key]

    def planned(rung: int, plan: LabPlan) -> None:
        steps = plan.planned[0].cell.recipe.train.steps
        say(f"rung {rung}: {len(plan.planned)} shapes, {steps} steps, {duration(plan.seconds)}")

    with LabView(list) as view:
        found = search(
            out, values, data, tried, model, limits,
            budget=seconds, seeds=seeds, listener=view, planned=planned,
        )  # fmt: skip
    if isinstance(found, Worked):  # it was stopped, or nothing could be trained
        return stopped(found)
    return show(found, out, json)


def stopped(worked: Worked) -> int:
    """Say why there is no winner."""
    if worked.interrupted is not None:
        say(f"stopped by {worked.interrupted}; the same command goes on")
        return EXIT_STATUS[worked.interrupted]
    raise UserError("no candidate could be trained", hint="look at the failed runs of the rung")


def show(found: Any, out: Path, json: bool) -> int:
    """Print the result."""
    if json:
        print_json(found)
        return 0
    rungs = [f"rung {number}" for number, _ in enumerate(found["steps"], 1)]
    cells = [["candidate", "ms a token", "MB", *rungs]]
    for each in found["candidates"]:
        bits = [f"{value:.4f}" for value in each["bits"]]
        cost = [f"{each['milliseconds']:.2f}", f"{each['megabytes']:.1f}"]
        cells.append([each["name"], *cost, *bits, *["-"] * (len(rungs) - len(bits))])
    put("\n".join(aligned(cells)))
    put(f"\nwinner: {found['winner']}\n{found['recipe']}\n{out / 'report.html'}")
    return 0


def run_shapes(folder: Path, preset: str, rule: ShapeRule) -> int:
    """Write shapes to profile, and say how."""
    config = ModelConfig.find(preset or DEFAULT_PRESET)
    paths = write_shapes(folder, sample_shapes(config, rule))
    put(f"{len(paths)} models with random weights in {folder}; profile them with")
    put(f"mobilellm profile {folder}/* --prompt 32 --generate 64 --out device")
    return 0
