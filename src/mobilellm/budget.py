"""The memory that a process may hold, asked before it is taken for what a file says of itself.

    ask(12 << 30, "model.gguf: its weights in float32")  # UserError where that is too much
    limit_memory("4GiB")                                 # --max-memory; jobs inherit it

A header of a few bytes can state sizes whose product is a terabyte. So whoever takes memory because
a file says so asks here first. Without a limit, SHARE of what is free at that moment is given.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

from mobilellm.errors import UserError

VARIABLE = "MOBILELLM_MAX_MEMORY"
"""The environment variable that holds the limit."""
SHARE = 0.8
"""Of the free memory, what may be taken when no limit is given."""
ALWAYS = 32 << 20
"""Bytes that nobody needs to ask for."""
CGROUP = Path("/sys/fs/cgroup")
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def limit_memory(text: str) -> None:
    """Limit this process, and those that it starts, to so many bytes ("4GiB", "500M", "1e9").

    `UserError` for what is no such number.
    """
    os.environ[VARIABLE] = str(parsed(text))


def parsed(text: str) -> int:
    """Bytes of a size with a unit: K, M, G or T, in powers of 1024, with or without "iB" or "B"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.I)
    size = int(float(match[1]) * 2 ** UNITS[match[2].upper()]) if match else 0
    if not size:
        raise UserError(f"--max-memory {text!r}: must be a size, such as 4GiB")
    return size


def room() -> int:
    """Bytes that may be taken now: up to the limit, else SHARE of what is free."""
    given = os.environ.get(VARIABLE)
    if given:
        return max(0, parsed(given) - held())
    return int(SHARE * free())


def ask(size: int, what: str, hint: str = "") -> None:
    """`UserError` unless `size` bytes may be taken for `what` ("PATH: its weights in float32")."""
    if size <= ALWAYS:
        return
    there = room()
    if size > there:
        raise UserError(
            f"{what}: {_gib(size)} of memory, where {_gib(there)} may be taken",
            hint=hint or "allow more with --max-memory, or use a machine with more",
        )


def free() -> int:
    """Bytes of main memory that can be had without swapping: of the machine, or of this process's
    control group where that has less."""
    found = _meminfo("MemAvailable")
    if found is None:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        found = min(found, max(0, most - used + cached))
    return found


def held() -> int:
    """Bytes of main memory that this process holds now; where the system does not tell, the most
    that it held so far."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _meminfo(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
