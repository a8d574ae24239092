"""Amounts as they are typed: times and limits with their units.

seconds_of("1.5h")                                                  # 5400.0
amount_of("max-latency", "20ms", {"ms": 1, "s": 1000})              # 20.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mobilellm.errors import UserError

UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """A budget in seconds: "6h", "90 min", "1.5h". `UserError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h|d)\s*", text)
    if match is None or not float(match[1]):
        raise UserError(f"budget {text!r}: no time", hint="write 6h, 90min or 300s")
    return float(match[1]) * UNITS[match[2]]


def amount_of(flag: str, text: str, units: Mapping[str, float]) -> float:
    """A limit such as "20ms" or "60MB" in the unit whose size is 1. `UserError` for anything
    else."""
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(units)})\s*", text)
    if match is None or not float(match[1]):
        first = next(iter(units))
        raise UserError(f"--{flag} {text!r}: no number of {first}", hint=f"write 20{first}")
    return float(match[1]) * units[match[2]]
