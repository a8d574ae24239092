"""GGUF's blocks of 32 numbers, from integers and scales that are given.

    rows = q4_0(weight)      # GridWeight -> (R, C / 32 * 18) bytes
    rows = q8_0(weight)      # GridWeight -> (R, C / 32 * 34) bytes

A Q4_0 block is a scale in float16 and 16 bytes: integer j plus 8 in the low half of byte j, integer
j + 16 plus 8 in the high half. A Q8_0 block is a scale in float16 and 32 signed bytes. Scales of
the grid are exact in float16, so that nothing is rounded here; a scale a row is repeated in each of
the row's blocks.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mobilellm.quantize.grid import GROUP, GridWeight


def q4_0(weight: GridWeight) -> np.ndarray:
    """The bytes of a matrix of 4 bits."""
    integers = _blocks(weight.integers)  # (R, B, 32)
    low, high = np.split((integers + 8).astype(np.uint8), 2, axis=-1)
    return _with_scales(weight, low | high << 4)


def q8_0(weight: GridWeight) -> np.ndarray:
    """The bytes of a matrix of 4 or 8 bits, in bytes."""
    return _with_scales(weight, _blocks(weight.integers).view(np.uint8))


def _blocks(integers: Tensor) -> np.ndarray:
    rows, columns = integers.shape
    return integers.cpu().contiguous().numpy().reshape(rows, columns // GROUP, GROUP)


def _with_scales(weight: GridWeight, numbers: np.ndarray) -> np.ndarray:
    """Blocks (R, B, n) with the scale before each: (R, B * (n + 2))."""
    rows, blocks, _ = numbers.shape
    scales = weight.scales.half().cpu().numpy().repeat(blocks // weight.scales.shape[1], axis=1)
    together = np.concatenate([scales[..., None].view(np.uint8), numbers], axis=-1)
    return np.ascontiguousarray(together.reshape(rows, -1))
