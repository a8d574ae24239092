"""ParetoQ's checkpoints in: a Llama whose matrices were trained for 1, 1.58, 2, 3 or 4 bits.

    bits = bits_of(values, "config.json")              # w_bits; None where nothing is quantized
    named, grids = on_grid(named, bits, "model")       # the matrices as the network multiplies them
    quantized = quantized_of(config, grids, bits)

Beside each matrix (R, C) of a block lies `weight_clip_val` (R, 1), the range a of a row that was
learned with it. What the network multiplies by (arXiv 2502.02631, section 4) is an integer times a
step, and both fit the blocks of 4 bits that every runtime reads:

| w_bits | integers | step |
|---|---|---|
| 1 | the sign | a |
| 0, which stands for 1.58 | -1, 0, 1: w / (2/3 a) rounded | 2/3 a |
| 2 | -3, -1, 1, 3: the nearest to w / (a/4) | a/4 |
| 3, 4 | -4 to 3, -8 to 7: w / a rounded | a |

Embedding and output layer are as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.weights import stacks
from mobilellm.quantize.grid import GROUP, GridWeight
from mobilellm.quantize.quantized import Quantized

KEY, RANGE = "w_bits", "weight_clip_val"
BITS = (0, 1, 2, 3, 4)
FLOAT_BITS = 16  # from here on nothing is quantized
SMALLEST_RANGE = 1e-5
CLIPPED = 0.99  # of the range, before 2 bits and 1.58 are rounded


def bits_of(values: Mapping[str, Any], where: str) -> int | None:
    """`w_bits` of a configuration. `UserError` for a number that ParetoQ does not have."""
    bits = values.get(KEY)
    if bits is None or (type(bits) is int and bits >= FLOAT_BITS):
        return None
    if type(bits) is not int or bits not in BITS:
        raise UserError(
            f"{where}: {KEY} = {str(bits)[:60]}: ParetoQ has 0 (1.58 bits), 1, 2, 3 and 4"
        )
    return bits


def integers_and_steps(weight: Tensor, ranges: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers (R, C), int8, and steps (R, 1), float32, of weights (R, C) with ranges (R, 1).

    Integers are chosen in the number type of the weights, as the network's own code does.
    """
    ranges = ranges.clamp_min(SMALLEST_RANGE)
    if bits == 1:
        return weight.sign().to(torch.int8), ranges.float()
    if bits in (0, 2):
        levels, shift = (1.5, 0.0) if bits == 0 else (2.0, 0.5)
        steps = ((weight / ranges).clamp(-CLIPPED, CLIPPED) * levels - shift).round() + shift
        integers = (steps * (1 if bits == 0 else 2)).to(torch.int8)
        return integers, ranges.float() * (torch.tensor(1.0) / levels / (1 if bits == 0 else 2))
    highest = 2 ** (bits - 1)
    return (weight / ranges).round().clamp(-highest, highest - 1).to(torch.int8), ranges.float()


def on_grid(
    named: Mapping[str, Tensor], bits: int, where: str
) -> tuple[dict[str, Tensor], dict[str, GridWeight]]:
    """Weights without their ranges, the matrices as the network multiplies by them; and these
    matrices as integers and a step a row, by their names.

    `UserError` for a matrix of a block without its range, or one of another shape.
    """
    found: dict[str, Tensor] = {}
    grids: dict[str, GridWeight] = {}
    for name, tensor in named.items():
        if name.endswith(f".{RANGE}"):
            continue
        found[name] = tensor
        if not name.startswith("model.layers.") or not name.endswith("_proj.weight"):
            continue
        ranges = named.get(name.removesuffix("weight") + RANGE)
        if ranges is None or tensor.ndim != 2 or ranges.shape != (tensor.shape[0], 1):
            raise UserError(
                f"{where}: {name} has no {RANGE} of a number a row, though {KEY} is {bits}",
                hint="the checkpoint is not ParetoQ's, or not whole",
            )
        integers, steps = integers_and_steps(tensor, ranges, bits)
        grids[name] = GridWeight(integers=integers, scales=steps, bits=4)
        found[name] = grids[name].dequantized()
    return found, grids


def quantized_of(
    config: ModelConfig, grids: Mapping[str, GridWeight], bits: int
) -> Quantized | None:
    """The matrices as the network has them in memory, with a scale for each 32 numbers; None where
    the rows do not divide by 32."""
    weights: dict[str, GridWeight] = {}
    for ours, parts in stacks(config).items():
        pieces = [grids[name] for name, _ in parts if name in grids]
        if not pieces:
            continue
        integers = torch.cat([piece.integers for piece in pieces])
        if integers.shape[1] % GROUP:
            return None
        scales = torch.cat([piece.scales for piece in pieces])
        scales = scales.repeat(1, integers.shape[1] // GROUP)
        weights[ours] = GridWeight(integers=integers, scales=scales, bits=4)
    facts = {"embedding": "float", "w_bits": bits}
    return Quantized(scheme="int4", method="ParetoQ", weights=weights, facts=facts)
