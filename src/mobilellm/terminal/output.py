"""How verbs talk: progress on standard error, results on standard output.

Sizes and times are written for people by `size` and `duration` (`mobilellm.report.figures` has the
other figures):

    duration(200)       # "3 min 20 s"
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mobilellm.printable import escaped_json, printable


def print_json(value: Any) -> None:
    """One JSON object on standard output. Numbers that are not finite become null."""
    import orjson

    text = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    sys.stdout.write(escaped_json(text.decode()))
    sys.stdout.flush()


def put(text: object = "", *, flush: bool = False) -> None:
    """Text and a line feed on standard output, safe for a terminal: names, keys and samples in it
    are of others."""
    print(printable(str(text)), flush=flush)


def say(text: str) -> None:
    """Text and a line feed on standard error, as safe."""
    print(printable(text), file=sys.stderr, flush=True)


def aligned(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of a table, the first `left` columns to the left and the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(wide) if i < left else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


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
