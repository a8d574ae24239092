"""The energy that the processor used, where the machine tells it (RAPL, Linux).

    meter = EnergyMeter()
    before = meter.joules()           # None where there is no counter, or it may not be read
    used = meter.since(before)        # joules, None where `before` is

Counters are those of whole packages: other work on the machine is counted too.
"""

from __future__ import annotations

import re
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")


class EnergyMeter:
    """The counters of all packages of a machine."""

    def __init__(self, folder: Path = COUNTERS) -> None:
        # "intel-rapl:0" is a package, "intel-rapl:0:1" a part of it; AMD's have the same names.
        self.packages = [p for p in folder.glob("*") if re.fullmatch(r"intel-rapl:\d+", p.name)]

    def joules(self) -> list[float] | None:
        """The counters, joules; None where one cannot be read, or there is none."""
        try:
            values = [int((p / "energy_uj").read_text()) / 1e6 for p in self.packages]
        except (OSError, ValueError):
            return None
        return values or None

    def since(self, before: list[float] | None) -> float | None:
        """Joules used since `before`; a counter that began anew in between is continued."""
        after = self.joules()
        if before is None or after is None:
            return None
        used = 0.0
        for package, start, end in zip(self.packages, before, after, strict=True):
            try:
                span = int((package / "max_energy_range_uj").read_text()) / 1e6
            except (OSError, ValueError):
                return None
            used += end - start if end >= start else span - start + end
        return used
