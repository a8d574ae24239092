"""Line and bar charts as inline SVG: no library, no script needed to read them, colors from the page's own palette.

    line_chart([Line("training", points, "c1", faint=True)], x="step", y="nats a token")

Points are thinned to a few hundred a line, keeping each stretch's lowest and highest, so that no spike is lost.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    points: Sequence[Point]
    color: str
    """Class of the stylesheet: c1, c2, ..."""
    faint: bool = False
    marked: bool = False
    """Draw its points."""


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about `most` points: of each of equal stretches the lowest and the highest, in their order."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = most // 2
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept.extend(sorted({low, high}))
    return kept


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Exponential moving average over about `span` points, corrected for its start."""
    decay, mean, weight, result = 1 - 1 / max(1, span), 0.0, 0.0, []
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + (1 - decay)
        result.append((x, mean / weight))
    return result


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    span = high - low or abs(high) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's label: 0.002, 2.5, 11k, 3M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.3g}"


def line_chart(title: str, lines: Sequence[Line], x: str, y: str, zero: bool = False) -> str:
    """An SVG figure; empty when there is nothing to draw. The page's script reads `data-lines` for the hover read-out."""
    drawn = [(line, [p for p in thin(line.points) if all(map(math.isfinite, p))]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [p[0] for _, points in drawn for p in points]
    # Half a percent of the values may fall outside, so that the first steps do not flatten the rest.
    ys = sorted(p[1] for _, points in drawn for p in points)
    low, high = ys[0], ys[min(len(ys) - 1, int(len(ys) * 0.995))]
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0  # a flat line stands in the middle
    low, high = 0.0 if zero and low >= 0 else low - margin, high + margin
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def at(point: Point) -> tuple[float, float]:
        px = LEFT + (point[0] - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        py = (
            HEIGHT
            - BOTTOM
            - (min(max(point[1], low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        )
        return round(px, 1), round(py, 1)

    parts = []
    for tick in ticks(low, high):
        py = at((x0, tick))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{py + 4}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x0, x1, 7):
        px = at((tick, low))[0]
        parts.append(
            f'<text x="{px}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{short(tick)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x)}</text>'
    )
    for line, points in drawn:
        path = " ".join(f"{px},{py}" for px, py in map(at, points))
        parts.append(
            f'<polyline class="{line.color}{" faint" if line.faint else ""}" points="{path}"/>'
        )
        if line.marked:
            parts.extend(
                f'<circle class="{line.color}" cx="{px}" cy="{py}" r="3.2"/>'
                for px, py in map(at, points)
            )
    legend = "".join(
        f'<span><i class="{line.color}{" faint" if line.faint else ""}"></i>{html.escape(line.name)}</span>'
        for line, _ in drawn
    )
    data = {
        "frame": [x0, x1, LEFT, WIDTH - RIGHT],
        "x": x,
        "lines": [
            [line.name, [[p[0], float(f"{p[1]:.5g}")] for p in points]]
            for line, points in drawn
            if not line.faint
        ],
    }
    return (
        f'<figure class="chart"><figcaption><b>{html.escape(title)}</b> <small>{html.escape(y)}</small>'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}" '
        f"data-lines='{html.escape(json.dumps(data), quote=True)}'>{''.join(parts)}</svg></figure>"
    )


def bar_chart(rows: Sequence[tuple[str, float, bool]], unit: str) -> str:
    """Horizontal bars with their figures; rows are (name, value, highlighted)."""
    most = max((value for _, value, _ in rows), default=1.0) or 1.0
    cells = "".join(
        f'<tr{" class=own" if own else ""}><th>{html.escape(name)}</th><td><div style="width:{100 * value / most:.1f}%"></div></td>'
        f"<td>{value:.3f}</td></tr>"
        for name, value, own in rows
    )
    return f'<table class="bars"><caption>{html.escape(unit)}</caption>{cells}</table>'
