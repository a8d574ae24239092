"""Shapes of networks by the paper's rules, and the shape that comes to a given size.

    rule = ShapeRule(head_dim=64, ffn_multiple=256)
    shaped(config, hidden_size=576, rule=rule)          # 9 heads, a feed-forward of 1,536
    solve(config, "hidden_size", 134e6, parameters_of, rule)

The paper's networks (arXiv 2402.14905, Tables 9 and 11) have one head for each 64 of the width, and
a feed-forward of 8/3 of the width, rounded up to a multiple of 256. Small networks take narrower
heads and finer multiples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from mobilellm.divisors import divisors
from mobilellm.errors import UserError
from mobilellm.model.config import LARGEST, ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.schema import AtLeast

TOLERANCE = 0.02
"""The largest share by which a cell may miss what is held equal."""
FITTED = (1.6, 4.2)
"""With ffn "fit": the feed-forward's width as a multiple of the model's, at least and at most."""
WIDEST = 512
"""Heads that are tried."""

Measure = Callable[[ModelConfig], float]
Free = Literal["hidden_size", "num_hidden_layers"]


@dataclass(frozen=True, kw_only=True)
class ShapeRule:
    """How the width decides the rest of a shape."""

    head_dim: Annotated[int, AtLeast(2)] = 64
    """Width of a head; the model's width is a multiple of it."""
    query_heads_per_kv: Annotated[int, AtLeast(1)] = 1
    """Query heads for each key/value head; where they do not divide, the next fewer."""
    ffn_multiple: Annotated[int, AtLeast(1)] = 256
    """The feed-forward is a multiple of it."""
    ffn: Literal["rule", "fit"] = "rule"
    """rule: 8/3 of the width, rounded up. fit: as near to that as holds the size equal, since the
    widths of small networks lie far apart."""


def parameters_of(config: ModelConfig) -> float:
    """Stored parameters."""
    return ModelCosts.of(config).parameters["total"]


def round_up(number: float, multiple: int) -> int:
    """The next multiple from `number` on."""
    return math.ceil(number / multiple - 1e-9) * multiple


def shaped(
    config: ModelConfig, hidden_size: int, rule: ShapeRule, intermediate_size: int = 0
) -> ModelConfig:
    """The configuration with this width, and with heads and feed-forward by the rule.

    `UserError` for a width that is no multiple of the head's.
    """
    if hidden_size % rule.head_dim or hidden_size < rule.head_dim:
        raise UserError(
            f"hidden_size {hidden_size} is no multiple of shape.head_dim {rule.head_dim}",
            hint=f"nearest: {max(rule.head_dim, hidden_size // rule.head_dim * rule.head_dim)}",
        )
    heads = hidden_size // rule.head_dim
    wanted = heads / rule.query_heads_per_kv
    return dataclasses.replace(
        config,
        hidden_size=hidden_size,
        head_dim=rule.head_dim,
        num_attention_heads=heads,
        num_key_value_heads=max(d for d in divisors(heads) if d <= max(1.0, wanted)),
        intermediate_size=intermediate_size or round_up(hidden_size * 8 / 3, rule.ffn_multiple),
    )


def solve(
    config: ModelConfig, free: Free, target: float, measure: Measure, rule: ShapeRule
) -> ModelConfig:
    """The configuration whose `measure` comes nearest to `target`, by a change of `free` alone.

    `measure` must grow with the size. `UserError` when even the nearest is off by more than
    `TOLERANCE`; it says what that has.
    """
    found = _layers(config, target, measure, rule) if free != "hidden_size" else None
    best = found or _width(config, target, measure, rule)
    off = measure(best) / target - 1
    if abs(off) > TOLERANCE:
        name = "width" if free == "hidden_size" else "depth"
        given = best.hidden_size if free == "hidden_size" else best.num_hidden_layers
        raise UserError(
            f"the nearest {name}, {given}, is off by {off:+.1%} (more than {TOLERANCE:.0%})",
            hint="choose another value"
            + ("" if rule.ffn == "fit" else ', or set shape.ffn = "fit"'),
        )
    return best


def _layers(config: ModelConfig, target: float, measure: Measure, rule: ShapeRule) -> ModelConfig:
    """The depth at the configuration's own width; with `fit` its feed-forward follows, too."""
    own = shaped(config, config.hidden_size, rule)
    candidates = [
        dataclasses.replace(own, num_hidden_layers=layers)
        for layers in _around(
            lambda n: measure(dataclasses.replace(own, num_hidden_layers=n)),
            target,
            LARGEST["num_hidden_layers"],
        )
    ]
    fitted = [_fitted(candidate, target, measure, rule) for candidate in candidates]
    return min(fitted, key=lambda found: _badness(found, target, measure))


def _width(config: ModelConfig, target: float, measure: Measure, rule: ShapeRule) -> ModelConfig:
    """The width at the configuration's own depth."""

    def of(heads: int) -> ModelConfig:
        return shaped(config, heads * rule.head_dim, rule)

    most = min(WIDEST, LARGEST["hidden_size"] // rule.head_dim)
    around = _around(lambda heads: measure(of(heads)), target, most)
    fitted = [_fitted(of(heads), target, measure, rule) for heads in around]
    return min(fitted, key=lambda found: _badness(found, target, measure))


def _around(measure: Callable[[int], float], target: float, most: int) -> list[int]:
    """The largest number from 1 on whose measure is at most the target, its neighbor above, and one
    more on either side."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(middle) <= target else (low, middle - 1)
    return [n for n in range(low - 1, low + 3) if 1 <= n <= most]


def _fitted(config: ModelConfig, target: float, measure: Measure, rule: ShapeRule) -> ModelConfig:
    """With `fit`, the configuration with the feed-forward that comes nearest to the target."""
    if rule.ffn == "rule":
        return config
    step, width = rule.ffn_multiple, config.hidden_size
    first, last = max(1, round_up(FITTED[0] * width, step) // step), int(FITTED[1] * width // step)
    if last < first:
        return config

    def of(multiple: int) -> ModelConfig:
        return dataclasses.replace(config, intermediate_size=multiple * step)

    near = _around(lambda n: measure(of(first - 1 + n)), target, last - first + 1)
    return min((of(first - 1 + n) for n in near), key=lambda c: abs(measure(c) / target - 1))


def _badness(config: ModelConfig, target: float, measure: Measure) -> tuple[bool, float, float]:
    """Whether it is off by more than may be; then how far its feed-forward is from 8/3 of the
    width, and how far it is off: the one that comes first is taken."""
    off = abs(measure(config) / target - 1)
    ratio = abs(math.log(config.intermediate_size * 3 / (8 * config.hidden_size)))
    return (off > TOLERANCE / 2, off if off > TOLERANCE / 2 else ratio, off)
