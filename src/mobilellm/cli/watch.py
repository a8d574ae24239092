"""`mobilellm watch`: a run's curves in the terminal, while it trains."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.errors import UserError
from mobilellm.report.figures import count
from mobilellm.terminal.output import duration


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


def cut(line: str, width: int) -> str:
    """At most `width` characters of a line, its end where it is longer."""
    return line if len(line) <= width else "…" + line[len(line) - width + 1 :]


def filled(facts: list[str], width: int) -> list[str]:
    """Facts with two spaces between, as many on a line as `width` characters allow."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + 2 + len(fact) <= width:
            lines[-1] += "  " + fact
        else:
            lines.append(cut(fact, width))
    return lines


def picture(run: Path, width: int, height: int) -> str:
    """Figures and curves of a run as text, `width` characters wide and about `height` lines
    high."""
    from mobilellm.recipe.recipe import Recipe
    from mobilellm.report.braille import plot
    from mobilellm.report.chart import smooth
    from mobilellm.report.figures import fixed, formatted
    from mobilellm.report.run_files import points, read_metrics

    recipe, (rows, _) = Recipe.read(run / "recipe.toml"), read_metrics(run / "metrics.jsonl")
    steps = recipe.train.steps
    if not rows:
        return f"{run}: no step yet of {steps:,}"

    last = rows[-1]
    speed, done = last["tokens_per_second"], last["step"]
    left = (steps - done) * recipe.train.batch_tokens / max(speed, 1e-9)
    state = "ended" if done >= steps else f"{duration(left)} left"
    facts = [
        f"step {done:,}/{steps:,}",
        f"{count(last['tokens'])} tokens",
        f"{speed:,.0f} tokens/s",
        state,
        f"loss {fixed(last['loss'], 4)}",
        f"lr {last['learning_rate']:.3g}",
        f"norm {formatted(last['grad_norm'], '.3g')}",
        f"MFU {last['mfu_6n']:.1%} (6N) {last['mfu_palm']:.1%} (PaLM)",
        f"{last['skipped']} skipped",
    ]
    lines = [cut(str(run), width), *filled(facts, width)]
    phases = {
        "data": last.get("data_seconds", 0.0),
        "compute": last.get("compute_seconds", 0.0),
        "optimizer": last.get("optimizer_seconds", 0.0),
    }
    if total := sum(phases.values()):
        shares = (f"{name} {seconds / total:.1%}" for name, seconds in phases.items())
        lines.append(cut("step time: " + ", ".join(shares), width))
    held_out = points(rows, "held_out_bits_per_byte")
    curves = [
        ("loss, smoothed (nats a token)", smooth(points(rows, "loss"), max(1, len(rows) // 50)))
    ]
    if len(held_out) > 1:
        now = fixed(held_out[-1][1], 4)
        curves.append((f"held-out (bits a byte), now {now}", held_out))
    room = max(5, (height - len(lines) - len(curves)) // len(curves))
    for title, curve in curves:
        lines += [title, *plot(curve, width, room)]
    return "\n".join(lines)
