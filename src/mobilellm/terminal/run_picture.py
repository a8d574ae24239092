"""A run's figures and curves as text for a terminal."""

from __future__ import annotations

from pathlib import Path

from mobilellm.damage import reading
from mobilellm.report.figures import count
from mobilellm.terminal.output import duration


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
    with reading(run, "a run"):
        return _picture(run, width, height)


def _picture(run: Path, width: int, height: int) -> str:
    from mobilellm.recipe.recipe import Recipe
    from mobilellm.report.braille import plot
    from mobilellm.report.chart import smooth
    from mobilellm.report.figures import fixed, formatted, grouped, percent
    from mobilellm.report.run_files import points, read_metrics

    recipe, (rows, _) = Recipe.read(run / "recipe.toml"), read_metrics(run / "metrics.jsonl")
    steps = recipe.train.steps
    if not rows:
        return f"{run}: no step yet of {steps:,}"

    last = rows[-1]
    speed, done = last.get("tokens_per_second") or 0.0, last["step"]
    left = (recipe.tokens() - recipe.tokens(done)) / max(speed, 1e-9)
    state = "ended" if done >= steps else f"{duration(left)} left"
    facts = [
        f"step {done:,}/{steps:,}",
        f"{count(last.get('tokens'))} tokens",
        f"{speed:,.0f} tokens/s",
        state,
        f"loss {fixed(last.get('loss'), 4)}",
        f"lr {formatted(last.get('learning_rate'), '.3g')}",
        f"norm {formatted(last.get('grad_norm'), '.3g')}",
        f"MFU {percent(last.get('mfu_6n'))} (6N) {percent(last.get('mfu_palm'))} (PaLM)",
        f"{grouped(last.get('skipped'))} skipped",
    ]
    lines = [cut(str(run), width), *filled(facts, width)]
    phases = {
        "data": last.get("data_seconds") or 0.0,
        "compute": last.get("compute_seconds") or 0.0,
        "optimizer": last.get("optimizer_seconds") or 0.0,
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
