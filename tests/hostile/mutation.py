"""Changes that keep a file's structure and break its meaning, or break its bytes; seeded.

rng = random.Random("config:7")
mutated_json(rng, {"hidden_size": 64})      # {"hidden_size": "\\x1b]0;pwned\\x07"}
mutated_bytes(rng, b"...")
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ESCAPES = "\x1b]0;pwned\x07\nsecond line\r\x9b31m\u202eevil"
SCRIPT = "\"'><script>document.title='PWNED'</script>"


def hostile_value(rng: random.Random) -> Any:
    """A value that no reader expects."""
    nested: Any = 1
    for _ in range(rng.choice([3, 80])):
        nested = [nested]
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 3, 2**31, 2**53, 2**63 - 1, -(2**63), 10**30, 1e308, -0.5,
            1e-320, "", "0", "null", "a" * 5000, ESCAPES, SCRIPT, "../../etc/passwd", "/dev/zero",
            "a/b", "\u0000", [], {}, [[]], [None], {"": None}, {ESCAPES: ESCAPES}, [1, "a", None],
            nested, {"a": nested}, [0] * 3000, ["x"] * 3000,
        ]
    )  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value but the whole."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(pairs)[:200]:
            found += [(*path, key), *places(part, (*path, key))]
    return found


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy with one to three changes in it: a value, a key, or a part."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found or rng.random() < 0.02:
            return hostile_value(rng)
        *path, last = rng.choice(found)
        part = value
        for key in path:
            part = part[key]
        kind = rng.random()
        if kind < 0.15:
            del part[last]
        elif kind < 0.25 and isinstance(part, dict):
            part[rng.choice([ESCAPES, SCRIPT, "x", "", str(last) + "s"])] = hostile_value(rng)
        elif kind < 0.35:
            part[last] = like(rng, part[last])
        elif kind < 0.42 and isinstance(part, list):
            part += part * rng.choice([1, 7])
        else:
            part[last] = hostile_value(rng)
    return value


def like(rng: random.Random, value: Any) -> Any:
    """A value of nearly the right kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, -value, value * 1000, float(value), str(value)])
    if isinstance(value, float):
        return rng.choice([-value, value * 1e9, int(value), str(value), 0.0])
    if isinstance(value, str):
        return rng.choice([value + ESCAPES, value[:-1], value.upper(), value * 300, [value]])
    return [value]


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """A value as JSON, one in four times with its bytes damaged, too."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, text) if rng.random() < 0.25 else text


def mutated_bytes(rng: random.Random, data: bytes, header: int = 1 << 30) -> bytes:
    """Bytes with one to four changes among the first `header`: flipped, cut, doubled, put in."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not changed:
            break
        where = rng.randrange(min(len(changed), header))
        kind = rng.random()
        if kind < 0.35:
            changed[where] ^= 1 << rng.randrange(8)
        elif kind < 0.55:
            changed[where : where + 8] = rng.choice(
                [
                    b"\xff" * 8,
                    b"\xff" * 7 + b"\x7f",
                    bytes(8),
                    (1 << rng.randrange(63)).to_bytes(8, "little"),
                ]
            )
        elif kind < 0.7:
            del changed[where:]
        elif kind < 0.8:
            del changed[where : where + rng.choice([1, 3, 100])]
        elif kind < 0.9:
            changed[where:where] = changed[where : where + rng.choice([1, 50, 500])]
        else:
            changed[where:where] = rng.randbytes(rng.choice([1, 4, 64]))
    return bytes(changed)
