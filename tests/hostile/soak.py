"""Fresh cases for as long as is asked: `python -m tests.hostile.soak --minutes 60`.

Prints a table of counts at the end, and each case that broke a promise as it comes, with what makes
it again: `python -m tests.hostile.soak --case GGUF:123`. Exit status 1 when there was one.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hostile.formats import FORMATS
from tests.hostile.trying import table, try_cases


def fresh(first: int, end: float) -> Iterator[tuple[str, int]]:
    """Cases of all formats in proportion to what the tests try of each, until the time `end`."""
    least = min(count for _, count in FORMATS.values())
    turn = [name for name, (_, count) in FORMATS.items() for _ in range(count // least)]
    seed = first
    while time.monotonic() < end:
        for name in turn:
            seed += 1
            yield name, seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--case", default="")
    given = parser.parse_args()
    first = secrets.randbelow(1 << 40) if given.seed is None else given.seed
    results = []
    with tempfile.TemporaryDirectory() as folder:
        from tests.hostile.base import make_base

        base = make_base(Path(folder) / "base")
        name, _, seed = given.case.rpartition(":")
        end = time.monotonic() + 60 * given.minutes
        cases = iter([(name, int(seed))]) if given.case else fresh(first, end)
        for result in try_cases(base, cases):
            results.append(result)
            if result["problems"] or given.case:
                print(json.dumps(result, ensure_ascii=True), flush=True)
    print(table(results))
    print(f"seeds from {first} on")
    sys.exit(any(result["problems"] for result in results))


if __name__ == "__main__":
    main()
