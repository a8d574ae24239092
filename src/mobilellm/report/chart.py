"""Line and bar charts as inline SVG, in the colors of the page's stylesheet.

    line_chart("Loss", [Line("training", points, "c1")], x="step", y="nats a token")

Points are thinned to a few hundred a line, keeping each stretch's lowest and highest, so that no
spike is lost. Charts are `Markup`: all text in them went through `Markup.format`, which escapes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mobilellm.report.figures import count, formatted, is_finite

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
MAX_POINTS = 600
SHOWN_SHARE = 0.995
"""Share of the values that the y axis spans: the first steps do not flatten the rest."""

GRID = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
LABEL = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
CURVE = Markup('<polyline class="{}{}" points="{}"/>')
AREA = Markup('<polygon class="band {}" points="{}"/>')
DOT = Markup('<circle class="{}" cx="{}" cy="{}" r="3.2"/>')
LEGEND = Markup('<span><i class="{}{}"></i>{}</span>')
FIGURE = Markup(
    '<figure class="chart"><figcaption><b>{title}</b> <small>{y}</small>'
    '<span class="legend">{legend}</span></figcaption>'
    '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}" data-lines="{data}">'
    "{parts}</svg></figure>"
)
BARS = Markup('<table class="bars"><caption>{}</caption>{}</table>')
BAR = Markup(
    '<tr{}><th>{}</th><td><div style="width:{:.1f}%"></div></td><td class="figure">{}</td></tr>'
)
OWN = Markup(' class="own"')
EMPTY = Markup("")


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
    dashed: bool = False
    joined: bool = True
    """Draw the line between its points."""

    @property
    def faintness(self) -> str:
        """The classes that a faint or dashed curve has beside its color."""
        return (" faint" if self.faint else "") + (" dashed" if self.dashed else "")


@dataclass(frozen=True)
class Band:
    """An area between two curves."""

    points: Sequence[tuple[float, float, float]]
    """x, lower and upper."""
    color: str


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about `most` points: of equal stretches the lowest and the highest, in order."""
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
    rough = max(span / about, 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's label: 0.002, 2.5, 11k, 3M."""
    return count(value, 6)


def value_range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Lowest and highest value that a y axis shows, `margin` of their distance added at both ends.

    A few of the highest may lie above it (`SHOWN_SHARE`); a flat curve stands in the middle.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(len(ordered) * SHOWN_SHARE))]
    room = margin * (high - low) if high > low else abs(high) * 0.1 or 1.0
    return low - room, high + room


def line_chart(
    title: str,
    lines: Sequence[Line],
    x: str,
    y: str,
    zero: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """An SVG figure, empty when there is nothing to draw; with `zero` the y axis begins at 0.
    `bands` lie behind the curves.

    The page's script reads `data-lines` and shows the figures under the pointer.
    """
    drawn = [(line, [p for p in thin(line.points) if all(map(is_finite, p))]) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return EMPTY
    xs = [p[0] for _, points in drawn for p in points]
    areas = [(band.color, [p for p in band.points if all(map(is_finite, p))]) for band in bands]
    ys = [p[1] for _, points in drawn for p in points]
    ys += [y for _, points in areas for p in points for y in p[1:]]
    low, high = value_range(ys, margin=0.06)
    if zero and min(ys) >= 0:
        low = 0.0
    x0, x1 = min(xs), max(xs)
    if x1 == x0:
        x1 = x0 + max(1.0, abs(x0) * 1e-3)

    def at(point: Point) -> tuple[float, float]:
        """Where a point lies in the picture, in its units."""
        right = (point[0] - x0) / (x1 - x0)
        up = (min(max(point[1], low), high) - low) / (high - low)
        px = LEFT + right * (WIDTH - LEFT - RIGHT)
        py = HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return round(px, 1), round(py, 1)

    parts = []
    for tick in ticks(low, high):
        py = at((x0, tick))[1]
        parts.append(GRID.format(LEFT, WIDTH - RIGHT, py, py))
        parts.append(LABEL.format(LEFT - 7, py + 4, "end", short(tick)))
    for tick in ticks(x0, x1, 7):
        px = at((tick, low))[0]
        parts.append(LABEL.format(px, HEIGHT - BOTTOM + 17, "middle", short(tick)))
    parts.append(LABEL.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", x))
    for color, found in areas:
        around = [at((p[0], p[1])) for p in found] + [at((p[0], p[2])) for p in reversed(found)]
        parts.append(AREA.format(color, " ".join(f"{px},{py}" for px, py in around)))
    for line, points in drawn:
        places = [at(point) for point in points]
        path = " ".join(f"{px},{py}" for px, py in places)
        if line.joined:
            parts.append(CURVE.format(line.color, line.faintness, path))
        if line.marked:
            parts.extend(DOT.format(line.color, px, py) for px, py in places)
    legend = [LEGEND.format(line.color, line.faintness, line.name) for line, _ in drawn]
    data = {
        "frame": [x0, x1, LEFT, WIDTH - RIGHT],
        "x": x,
        "lines": [
            [line.name, [[p[0], float(f"{p[1]:.5g}")] for p in points]]
            for line, points in drawn
            if not line.faint
        ],
    }
    return FIGURE.format(
        title=title,
        y=y,
        legend=EMPTY.join(legend) if len(legend) > 1 else EMPTY,
        width=WIDTH,
        height=HEIGHT,
        data=json.dumps(data),
        parts=EMPTY.join(parts),
    )


def bar_chart(rows: Sequence[tuple[str, object, bool]], unit: str, form: str = ".3f") -> Markup:
    """Horizontal bars with their figures; rows are (name, value, highlighted).

    A value that is no finite number has no bar, and its figure says what it is.
    """
    lengths = [float(value) if is_finite(value) else 0.0 for _, value, _ in rows]  # type: ignore[arg-type]
    most = max(lengths, default=1.0) or 1.0
    bars = [
        BAR.format(
            OWN if own else "",
            name,
            100 * max(0.0, length) / most,
            formatted(value, form),
        )
        for (name, value, own), length in zip(rows, lengths, strict=True)
    ]
    return BARS.format(unit, EMPTY.join(bars))
