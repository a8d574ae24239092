"""`mobilellm watch`: a run's curves in the terminal, while it trains."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mobilellm.cli.terminal import count, duration
from mobilellm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Draw the curves of a run in the terminal, live until it ends or Ctrl-C.

    Example: mobilellm watch runs/book
    """

    run_folder: tyro.conf.Positional[Path]
    """Run folder."""
    every: float = 1.0
    """Seconds between looks."""
    once: bool = False
    """Draw once and end, as is done anyway when the output is no terminal."""

    def run(self) -> int:
        """Watch; 0 at the run's end, 130 after Ctrl-C."""
        if not (self.run_folder / "recipe.toml").is_file():
            raise UserError(
                f"{self.run_folder}: no run here (no recipe.toml)",
                hint="give the folder that `train --out` named",
            )
        if not self.every > 0:
            raise UserError(f"--every {self.every}: must be a number of seconds above 0")
        if self.once or not sys.stdout.isatty():
            print(picture(self.run_folder, 80, 30))
            return 0
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(), screen=False, auto_refresh=False) as live:
            while True:
                size = shutil.get_terminal_size()
                live.update(
                    Text(picture(self.run_folder, min(size.columns - 1, 160), size.lines - 2)),
                    refresh=True,
                )
                if (self.run_folder / "result.json").is_file():
                    return 0
                time.sleep(self.every)


def picture(run: Path, width: int, height: int) -> str:
    """Figures and curves of a run as text."""
    from mobilellm.report.braille import plot
    from mobilellm.report.chart import smooth
    from mobilellm.report.page import read_metrics
    from mobilellm.train.recipe import Recipe

    recipe, (rows, _) = Recipe.read(run / "recipe.toml"), read_metrics(run / "metrics.jsonl")
    steps = recipe.train.steps
    if not rows:
        return f"{run}: no step yet of {steps:,}"

    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]

    last: dict[str, Any] = rows[-1]
    speed = last["tokens_per_second"]
    left = (steps - last["step"]) * recipe.train.batch_tokens / max(speed, 1e-9)
    loss, norm = (
        last[key] if last[key] is not None else float("nan") for key in ("loss", "grad_norm")
    )
    lines = [
        (
            f"{run}  step {last['step']:,}/{steps:,}  {count(last['tokens'])} tokens  {speed:,.0f} tokens/s  "
            f"{'ended' if last['step'] >= steps else duration(left) + ' left'}"
        ),
        (
            f"loss {loss:.4f}  lr {last['learning_rate']:.3g}  norm {norm:.3g}  MFU {last['mfu_6n']:.1%} (6N) "
            f"{last['mfu_palm']:.1%} (PaLM)  {last['skipped']} skipped"
        ),
    ]
    shares = {
        k.removesuffix("_seconds"): v
        for k, v in last.items()
        if k in ("data_seconds", "compute_seconds", "optimizer_seconds")
    }
    if total := sum(shares.values()):
        lines.append(
            "step time: "
            + ", ".join(f"{name} {value / total:.1%}" for name, value in shares.items())
        )
    held_out = points("held_out_bits_per_byte")
    curves = [("loss, smoothed (nats a token)", smooth(points("loss"), max(1, len(rows) // 50)))]
    if len(held_out) > 1:
        curves.append((f"held-out (bits a byte), now {held_out[-1][1]:.4f}", held_out))
    room = max(5, (height - len(lines) - len(curves)) // len(curves))
    for title, curve in curves:
        lines += [title, *plot(curve, width, room)]
    return "\n".join(lines)
