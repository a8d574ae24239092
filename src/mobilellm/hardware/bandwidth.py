"""How fast this machine reads and copies memory: the bound of everything that reads all weights for
each token.

    found = memory_bandwidth(seconds=0.2)
    found["read"], found["copy"]      # bytes a second, the best of several passes

Two ways are measured: a product of a large matrix with a vector, which only reads, as decoding
does, and a copy, which reads and writes. Neither is taken from a data sheet: a shared machine
rarely has what its maker promises. All threads that torch has take part.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

ARRAY_BYTES = 256 << 20
"""Of one array, several times what caches hold."""
MIN_PASSES = 3
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def memory_bandwidth(seconds: float = 0.3, array_bytes: int = ARRAY_BYTES) -> dict[str, float]:
    """Bytes a second of reading alone ("read") and of a copy, both ways counted ("copy").

    Each is the best of the passes that `seconds` have room for: other work on the machine can only
    slow one down.
    """
    width = 4096
    source = torch.ones(max(1, array_bytes // (4 * width)), width)
    vector, target = torch.ones(width), torch.empty_like(source)
    size = source.numel() * 4
    return {
        "read": size / _best(lambda: source @ vector, seconds),
        "copy": 2 * size / _best(lambda: target.copy_(source), seconds),
    }


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest of the passes in `seconds`, in seconds."""
    work()  # memory is given when it is first written
    best, passes, begin = float("inf"), 0, time.perf_counter()
    while passes < MIN_PASSES or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        passes += 1
    return best


def cache_bytes(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of the caches that the first processor sees, by level ("L2"); instruction caches left
    out, empty where the system does not tell."""
    found: dict[str, int] = {}
    for index in sorted(folder.glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
            unit = {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
            level = int((index / "level").read_text())
            found[f"L{level}"] = int(size[:-1] if unit else size) << unit
    return found
