"""One grid of integers and scales that every runtime reads.

int4 lies in [-8, 7] with a scale for each 32 numbers along the input; int8 lies in [-127, 127] with
a scale a row. There is no zero point. Scales are positive, have 8 significant bits, so that
float32, bfloat16 and float16 hold them exactly, and are at least 2**-14, float16's smallest normal
number. The same integers and scales are GGUF's Q4_0 and Q8_0, ONNX's MatMulNBits, and ExecuTorch's
XNNPACK kernels, which refuse a scale of 0 or below.

    weight = GridWeight(integers=integers, scales=scales, bits=4)
    weight.dequantized()                  # float32, exact
    on_grid(values, scales, bits=4)       # the integers back from values that lie on the grid

Shapes: R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobilellm.errors import UserError

GROUP = 32
"""Columns that share a scale at 4 bits."""
SMALLEST_SCALE = 2.0**-14
ON_GRID_AT_ONCE = 1 << 18
"""Numbers of a matrix that are compared at once, so that they stay in the cache."""
LOWEST = {4: -8, 8: -127}
HIGHEST = {4: 7, 8: 127}


@dataclass(frozen=True, kw_only=True)
class GridWeight:
    """A matrix on the grid."""

    integers: Tensor
    """(R, C), int8."""
    scales: Tensor
    """(R, G), float32; each belongs to C / G neighboring columns."""
    bits: int
    """4 or 8."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.integers.shape[1] // self.scales.shape[1]

    def dequantized(self) -> Tensor:
        """The matrix that it stands for, (R, C) in float32."""
        return dequantized(self.integers, self.scales)

    def rows(self, start: int, stop: int) -> GridWeight:
        """Rows `start` to `stop` alone, without copying."""
        return GridWeight(
            integers=self.integers[start:stop], scales=self.scales[start:stop], bits=self.bits
        )


def portable(scales: Tensor) -> Tensor:
    """The nearest scales that every runtime holds exactly and takes, in float32."""
    return scales.to(torch.bfloat16).float().clamp_min(SMALLEST_SCALE)


def dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """Integers (R, C) times their scales (R, G), in float32."""
    rows, groups = scales.shape
    values = integers.float().view(rows, groups, -1) * scales.unsqueeze(-1)
    return values.view(rows, -1)


def rounded(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest integers of the grid to values (R, C) at these scales (R, G): (R, C), int8."""
    rows, groups = scales.shape
    steps = values.float().view(rows, groups, -1) / scales.unsqueeze(-1)
    return steps.round_().clamp_(LOWEST[bits], HIGHEST[bits]).view(rows, -1).to(torch.int8)


def on_grid(values: Tensor, scales: Tensor, bits: int, where: str = "weight") -> GridWeight:
    """The grid's integers of values (R, C) that lie on it. `UserError` where they do not."""
    integers = torch.empty(values.shape, dtype=torch.int8)
    step, fits = max(1, ON_GRID_AT_ONCE // max(1, values.shape[1])), True
    for start in range(0, len(values), step):
        part, own = values[start : start + step].float(), scales[start : start + step]
        integers[start : start + step] = rounded(part, own, bits)
        fits &= torch.equal(dequantized(integers[start : start + step], own), part)
    if not fits:
        raise UserError(
            f"{where}: its numbers do not lie on the grid that quantization.json names",
            hint="the weights were changed after quantizing: quantize the model again",
        )
    return GridWeight(integers=integers, scales=scales, bits=bits)


def groups_of(columns: int, bits: int) -> int:
    """How many scales a row of `columns` numbers has; 0 where the grid does not fit it."""
    if bits == 8:
        return 1
    return 0 if columns % GROUP else columns // GROUP
