"""Curves in a terminal: eight dots a character (Unicode's Braille patterns).

for line in plot(points, width=72, height=14):
    print(line)
"""

from __future__ import annotations

from collections.abc import Sequence

from mobilellm.report.chart import Point, short, ticks, value_range
from mobilellm.report.figures import is_finite

# Bit of the dot at (column, row) of a character's 2 x 4 dots.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
LEFT = 9
"""Characters that the y axis and its labels take."""


def plot(points: Sequence[Point], width: int = 72, height: int = 12) -> list[str]:
    """The curve through `points` as lines of text, `width` x `height` characters with the axes;
    empty without points."""
    points = [p for p in points if all(map(is_finite, p))]
    if not points:
        return []
    columns, rows = 2 * max(1, width - LEFT), 4 * max(1, height - 1)
    low, high = value_range([y for _, y in points])
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    cells = [[0] * (columns // 2) for _ in range(rows // 4)]

    def at(x: float, y: float) -> tuple[int, int]:
        """Column and row of a point, in dots."""
        share = (min(max(y, low), high) - low) / (high - low)
        return round((x - x0) / ((x1 - x0) or 1) * (columns - 1)), round((1 - share) * (rows - 1))

    before: tuple[int, int] | None = None
    for x, y in points:
        here = at(x, y)
        steps = 1 if before is None else max(1, abs(here[0] - before[0]), abs(here[1] - before[1]))
        start = before or here
        for i in range(steps + 1):
            column = start[0] + (here[0] - start[0]) * i // steps
            row = start[1] + (here[1] - start[1]) * i // steps
            cells[row // 4][column // 2] |= DOTS[column % 2][row % 4]
        before = here
    marks = {at(x0, tick)[1] // 4: short(tick) for tick in ticks(low, high, max(2, height // 3))}
    lines = [
        f"{marks.get(row, ''):>{LEFT - 2}} {'┤' if row in marks else '│'}"
        + "".join(chr(0x2800 + cell) for cell in line)
        for row, line in enumerate(cells)
    ]
    first, last = short(x0), short(x1)
    rule = "─" * max(0, columns // 2 - len(first) - len(last))
    return [*lines, " " * (LEFT - 1) + "└" + first + rule + last]
