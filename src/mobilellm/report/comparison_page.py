"""One page about several runs: curves on the same axes, and what differs between the recipes.

write_comparison([Path("runs/a"), Path("runs/b")], Path("comparison.html"))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.report.chart import Line, line_chart, smooth
from mobilellm.report.figures import MISSING, count, fixed, grouped, is_finite
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
        finals=[
            [name, *final_figures(run), *equal]
            for (name, run), equal in zip(files.items(), at_equal_cost(files.values()), strict=True)
        ],
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


def flops_a_token(run: RunFiles) -> float | None:
    """FLOPs of a run's training a token: 6 a parameter, and its teacher's share; None where the run
    has not ended."""
    figures = mapping(mapping(run.result.get("model")).get("flops_per_token"))
    training = mapping(run.result.get("training"))
    own: Any = figures.get("six_n")
    tokens: Any = training.get("tokens")
    teacher: Any = training.get("teacher_flops", 0)
    if not (is_finite(own) and is_finite(tokens) and is_finite(teacher) and tokens):
        return None
    return float(own) + float(teacher) / float(tokens)


def at_equal_cost(runs: Iterable[RunFiles]) -> list[list[str]]:
    """Held-out bits a byte of each run when it had seen as many tokens, and spent as many FLOPs, as
    the shortest and the cheapest of them: its last evaluation up to there."""
    runs = list(runs)
    costs = [flops_a_token(run) for run in runs]
    curves = [run.points("held_out_bits_per_byte", "tokens") for run in runs]
    found: list[list[str]] = [[] for _ in runs]
    for scales in ([1.0] * len(runs), costs):
        known = [
            [(tokens * scale, bits) for tokens, bits in curve] if scale is not None else []
            for curve, scale in zip(curves, scales, strict=True)
        ]
        limit = min((points[-1][0] for points in known if points), default=0.0)
        for row, points in zip(found, known, strict=True):
            reached = [bits for cost, bits in points if cost <= limit * (1 + 1e-9)]
            row.append(fixed(reached[-1] if reached else MISSING, 4))
    return found


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
