"""The order of samples as a computed permutation: no table, any size, the same on every machine.

    permute(np.arange(10), 10, key)   # the numbers 0..9 in the order that `key` stands for

A Feistel network (Luby and Rackoff, 1988) over the smallest even number of bits that holds n
permutes a range up to four times too large; walking along its cycles until the value falls below
n (Black and Rogaway, 2002) leaves a permutation of exactly n.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Four make a pseudo-random permutation of a strong round function; ours is only a mixer, so a few
# more.
ROUNDS = 6

U64 = NDArray[np.uint64]


def derive_key(*parts: int | str) -> int:
    """64 bits that depend on every part, for instance (seed, epoch)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _mix(x: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit moves about
    half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: NDArray[np.integer], n: int, key: int) -> NDArray[np.int64]:
    """Where the permutation of 0..n-1 that `key` stands for takes each of `indices` (each below
    n, any shape)."""
    if n < 1 or n > 1 << 62:
        raise ValueError(f"n = {n}: must be from 1 to 2^62")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = [np.uint64(derive_key(key, number)) for number in range(ROUNDS)]

    def network(values: U64) -> U64:
        left, right = values >> shift, values & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & low)
        return (left << shift) | right

    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        values = np.asarray(indices).astype(np.uint64)
        shape = values.shape
        flat = network(values.ravel())
        outside = np.flatnonzero(flat >= n)
        while (
            outside.size
        ):  # at most three quarters at first, and a shrinking share each time round
            flat[outside] = network(flat[outside])
            outside = outside[flat[outside] >= n]
    return flat.reshape(shape).astype(np.int64)
