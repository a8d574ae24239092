"""How verbs talk: progress on standard error, results on standard output.

Figures are written for people by `count`, `size`, `duration` and `figure`:

    duration(200)       # "3 min 20 s"
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any


def print_json(value: Any) -> None:
    """One JSON object on standard output. Numbers that are not finite become null."""
    import orjson

    sys.stdout.write(
        orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY).decode()
    )
    sys.stdout.flush()


def say(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(what: str, unit: str = "") -> Iterator[Callable[[float, float], None]]:
    """Yield `update(done, total)`, which draws a bar with rate and remaining time.

    Nothing is drawn when standard error is no terminal. `unit` "bytes" shows sizes; any other is
    printed after the rate ("tokens" -> "11,483 tokens/s").
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def update(done: float, total: float) -> None:
            speed = bar.tasks[0].speed or 0
            shown = (
                f"{speed / 1e6:,.1f} MB/s"
                if unit == "bytes"
                else f"{speed:,.0f} {unit}/s"
                if unit
                else ""
            )
            bar.update(task, completed=done, total=total, rate=shown if speed else "")

        yield update


MAX_WRITTEN_OUT = 1e15  # numbers from here on are written with an exponent


def count(number: float) -> str:
    """12,345,678 -> "12.3M"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def figure(number: float | None, form: str) -> str:
    """A measured figure in the given format; one that is missing or not finite is "infinite".

    JSON has no infinity: the perplexity of a run whose loss exploded is null in result.json.
    """
    if number is None or not math.isfinite(number):
        return "infinite"
    return format(number, ".2g" if abs(number) >= MAX_WRITTEN_OUT else form)


def size(number: float) -> str:
    """Bytes with a unit: 249270912 -> "238 MiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            value = number / 1024**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{number:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds as "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
