"""Whole numbers that divide another: what batches, processes and heads are cut by.

nearest_divisors(96, 7)     # [6, 8]
largest_divisor(96, 7)      # 6
"""

from __future__ import annotations


def divisors(number: int) -> list[int]:
    """Every divisor of `number` (from 1 on), smallest first."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_divisors(number: int, wanted: int) -> list[int]:
    """The divisors of `number` on either side of `wanted`: the largest below, the smallest above,
    where there are such.

    `wanted` alone when it divides.
    """
    found = divisors(number)
    if wanted in found:
        return [wanted]
    return [n for n in found if n < wanted][-1:] + [n for n in found if n > wanted][:1]


def nearest_multiples(number: int, wanted: int) -> list[int]:
    """The multiples of `number` on either side of `wanted`, none below `number`; `wanted` alone
    when it is one."""
    if wanted >= number and wanted % number == 0:
        return [wanted]
    below = wanted // number * number
    return [n for n in (below, below + number) if n >= number]


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`; 1 for a `most` below that."""
    return max(n for n in divisors(number) if n <= max(1, most))
