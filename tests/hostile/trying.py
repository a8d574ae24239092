"""Cases tried in a process of their own, which is started again when one of them ends it.

results = try_cases(base, [("GGUF", 0), ("GGUF", 1)])
table(results)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mobilellm.jobs.pool import ONE_THREAD

WHOLE = 12  # sound inputs in formats.whole
ROOT = Path(__file__).resolve().parents[2]


def try_cases(base: Path, cases: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """What became of each case, in order. A case that ended the process has that as its problem."""
    child: subprocess.Popen[str] | None = None
    for name, seed in cases:
        if child is None:
            child = _start(base)
        assert child.stdin is not None
        assert child.stdout is not None
        answer = None
        try:
            child.stdin.write(json.dumps({"format": name, "seed": seed}) + "\n")
            child.stdin.flush()
            begun = child.stdout.readline()
            line = child.stdout.readline() if begun else ""
            answer = json.loads(line) if line else None
        except BrokenPipeError:
            pass
        if answer is None:
            status = child.wait()
            child = None
            problem = f"the process ended with status {status}"
            answer = {
                "format": name, "seed": seed, "status": status, "net": False, "problems": [problem],
                "seconds": 0.0, "peak": 0, "text": "", "command": [],
            }  # fmt: skip
        yield answer
    if child is not None:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()


def try_whole(base: Path) -> list[dict[str, Any]]:
    """What becomes of the sound inputs that the cases change, by the same verbs."""
    return list(try_cases(base, [("whole", number) for number in range(WHOLE)]))


def _start(base: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.child", str(base)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | ONE_THREAD,
    )  # fmt: skip


def table(results: Iterable[dict[str, Any]]) -> str:
    """Cases by format: how many there were, read, refused, and broke a promise; the most memory and
    time of one."""
    lines = ["| format | cases | read | refused | by the last net | broken | most MiB | most s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    by_format: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_format.setdefault(result["format"], []).append(result)
    total: Counter[str] = Counter()
    for name, found in by_format.items():
        counts = {
            "cases": len(found),
            "read": sum(one["status"] == 0 for one in found),
            "refused": sum(one["status"] == 2 for one in found),
            "net": sum(one["net"] for one in found),
            "broken": sum(bool(one["problems"]) for one in found),
        }
        total.update(counts)
        peak, seconds = max(one["peak"] for one in found), max(one["seconds"] for one in found)
        numbers = " | ".join(f"{count:,}" for count in counts.values())
        lines.append(f"| {name} | {numbers} | {peak / 2**20:,.0f} | {seconds:.1f} |")
    lines.append("| all | " + " | ".join(f"{count:,}" for count in total.values()) + " | | |")
    return "\n".join(lines)
