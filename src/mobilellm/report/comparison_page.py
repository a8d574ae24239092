"""One page about several runs: curves on the same axes, and what differs between the recipes.

write_comparison([Path("runs/a"), Path("runs/b")], Path("comparison.html"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from mobilellm.report.chart import Line, line_chart, smooth
from mobilellm.report.figures import MISSING, count, fixed, grouped
from mobilellm.report.frame import write_page
from mobilellm.report.run_files import RunFiles, mapping
from mobilellm.report.run_page import SMOOTHING

COLORS = 5
MAX_MARKED = 60
"""Curves of fewer points show each of them."""


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Write the page of `runs` to `path`. Runs in folders of one name go by their whole path."""
    names = [run.resolve().name for run in runs]
    files = {
        name if names.count(name) == 1 else str(run): RunFiles.read(run)
        for name, run in zip(names, runs, strict=True)
    }
    write_page(
        path,
        "comparison.html.j2",
        kind="mobilellm comparison",
        title=f"{len(files)} runs",
        names=list(files),
        finals=[[name, *final_figures(run)] for name, run in files.items()],
        curves=curves(files),
        differences=differences({name: run.recipe for name, run in files.items()}),
    )
    return path


def curves(files: Mapping[str, RunFiles]) -> list[Markup]:
    """The charts, a line a run in each."""

    def lines(key: str, smoothed: bool = False, over: str = "tokens") -> list[Line]:
        found = []
        for number, (name, run) in enumerate(files.items()):
            points = run.points(key, over)
            curve = smooth(points, len(points) // SMOOTHING) if smoothed else points
            marked = not smoothed and len(points) < MAX_MARKED
            found.append(Line(name, curve, f"c{number % COLORS + 1}", marked=marked))
        return found

    held_out, seconds = "held_out_bits_per_byte", "seconds of training"
    loss, norm = lines("loss", smoothed=True), lines("grad_norm", smoothed=True)
    return [
        line_chart("Training loss, smoothed", loss, "tokens", "nats a token"),
        line_chart("Held-out", lines(held_out), "tokens", "bits a byte"),
        line_chart("Held-out over time", lines(held_out, over="seconds"), seconds, "bits a byte"),
        line_chart("Learning rate", lines("learning_rate"), "tokens", "", zero=True),
        line_chart("Gradient norm, smoothed", norm, "tokens", "before clipping", zero=True),
        line_chart("Speed", lines("tokens_per_second"), "tokens", "tokens a second", zero=True),
    ]


def final_figures(run: RunFiles) -> list[str]:
    """Steps, tokens, last loss, held-out bits a byte and speed of a run as texts."""
    last, result = run.last, run.result
    held_out, training = mapping(result.get("held_out")), mapping(result.get("training"))
    scored = run.points("held_out_bits_per_byte")
    bits: object = scored[-1][1] if scored else MISSING
    return [
        grouped(last.get("step", 0)),
        count(last.get("tokens", 0), 4),
        fixed(last.get("loss", MISSING), 4),
        fixed(held_out.get("bits_per_byte", bits), 4),
        fixed(training.get("tokens_per_second", last.get("tokens_per_second", MISSING)), 0),
    ]


def differences(recipes: Mapping[str, str]) -> list[list[str]]:
    """Settings whose values differ between the recipes' TOML texts: name, then each run's value."""
    settings: dict[str, dict[str, str]] = {}
    for name, text in recipes.items():
        section = ""
        for line in text.splitlines():
            if line.startswith("["):
                section = line.strip("[]") + "."
            elif " = " in line:
                key, value = line.split(" = ", 1)
                settings.setdefault(section + key, {})[name] = value
    return [
        [key, *(values.get(name, MISSING) for name in recipes)]
        for key, values in settings.items()
        if len({values.get(name) for name in recipes}) > 1
    ]
