"""Ways to choose scales for given weights, and the integers nearest to the weights at them.

    weight = ROUNDINGS["search"](values, 4)      # values (R, C) -> GridWeight

`round` takes the smallest scale at which nothing is clipped. `search` takes the scale of least
squared error among a few dozen: a smaller one clips the largest number of its group and rounds all
others more finely. Both work on a few rows at a time, so that the largest matrix costs little
memory beside itself.

Shapes: R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mobilellm.quantize.grid import HIGHEST, LOWEST, GridWeight, groups_of, portable, rounded

SHARES = (0.75, 1.02)
"""The range of scales that `search` tries, as shares of the smallest that clips nothing."""
STEPS = 32
"""How many of them; scales of 8 significant bits are hardly more."""
CHUNK = 1 << 20
"""Numbers of a matrix that are worked on at a time."""


def unclipped(values: Tensor, bits: int) -> Tensor:
    """The smallest scales at which no number is clipped: values (R, C) -> (R, G), not portable."""
    rows, columns = values.shape
    grouped = values.float().view(rows, groups_of(columns, bits), -1)
    highest, lowest = grouped.amax(-1) / HIGHEST[bits], grouped.amin(-1) / LOWEST[bits]
    return torch.maximum(highest, lowest)


def round_to_grid(values: Tensor, bits: int) -> GridWeight:
    """Scales at which nothing is clipped."""
    scales = portable(unclipped(values, bits))
    return GridWeight(integers=rounded(values, scales, bits), scales=scales, bits=bits)


def search_grid(values: Tensor, bits: int, importance: Tensor | None = None) -> GridWeight:
    """Scales of least squared error, each column's error weighted by `importance` (C,)."""
    at_once = max(1, CHUNK // values.shape[1])
    parts = [_searched(part, bits, importance) for part in values.split(at_once)]
    scales = torch.cat(parts)
    return GridWeight(integers=rounded(values, scales, bits), scales=scales, bits=bits)


def _searched(values: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """The scales of `search_grid` for some rows, (R, G)."""
    rows, columns = values.shape
    groups = groups_of(columns, bits)
    grouped = values.float().view(rows, groups, -1)  # (R, G, C / G)
    weights = None if importance is None else importance.float().view(1, groups, -1)
    widest = unclipped(values, bits)
    best = portable(widest)
    least = torch.full_like(best, torch.inf)
    for share in torch.linspace(*SHARES, STEPS).tolist():
        scales = portable(widest * share)
        steps = grouped / scales.unsqueeze(-1)
        steps.round_().clamp_(LOWEST[bits], HIGHEST[bits])
        errors = steps.mul_(scales.unsqueeze(-1)).sub_(grouped).square_()
        error = (errors if weights is None else errors.mul_(weights)).sum(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return best


ROUNDINGS: dict[str, Callable[[Tensor, int], GridWeight]] = {
    "round": round_to_grid,
    "search": search_grid,
}
