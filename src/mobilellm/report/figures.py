"""Figures as text, the same way in terminals, charts and pages.

    count(12_345_678)            # "12.3M"
    fixed(None, 2)               # "not finite"

A value that was read from a file may be anything. JSON has no infinity and writes null in its
place, so None reads "not finite"; text stays as it is, and the page that shows it escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = "not finite"
MISSING = "-"
MAX_MAGNITUDE = 1e300
"""Numbers beyond it count as not finite: the difference of two of them may be."""
MAX_WRITTEN_OUT = 1e15
"""Numbers from here on are written with an exponent."""
SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def is_finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn and calculated with."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= MAX_MAGNITUDE  # False for NaN
    )


def formatted(value: Any, form: str) -> str:
    """A number in the format `form`; `NOT_FINITE` for null, infinity and NaN; others as text."""
    if is_finite(value):
        return format(value, form)
    if value is None or isinstance(value, float):
        return NOT_FINITE
    return str(value) or MISSING


def fixed(value: Any, digits: int) -> str:
    """A number with `digits` after the point and commas between thousands: 1,234.57. A number of
    more than fifteen digits, such as the perplexity of a run that exploded, is 6.6e+292."""
    if is_finite(value) and abs(value) >= MAX_WRITTEN_OUT:
        return formatted(value, ".2g")
    return formatted(value, f",.{digits}f")


def grouped(value: Any) -> str:
    """A whole number with commas between thousands: 12,345,678."""
    return formatted(value, ",.0f" if isinstance(value, float) else ",")


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage: 0.125 -> "12.5%"."""
    return formatted(value, f".{digits}%")


def count(value: Any, digits: int = 3) -> str:
    """A number in `digits` significant digits with the letter of its size: "12.3M"."""
    if is_finite(value):
        for size, letter in SUFFIXES:
            if abs(value) >= size:
                return f"{value / size:.{digits}g}{letter}"
    return formatted(value, f".{max(digits, 6)}g")


def ratio(part: Any, whole: Any) -> float | None:
    """`part / whole` where both are numbers and it exists."""
    if not (is_finite(part) and is_finite(whole)) or not whole:
        return None
    quotient = float(part / whole)
    return quotient if math.isfinite(quotient) else None


def tables(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list in a result; empty where it is missing, or is something else."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
