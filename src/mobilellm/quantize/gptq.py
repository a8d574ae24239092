"""GPTQ on the portable grid: integers chosen column by column, each column's error made up for.

    weights = gptq_blocks(network, bits, tokens)     # tokens (N, T) of a calibration text

The method is that of Frantar, Ashkboos, Hoefler and Alistarh (arXiv 2210.17323): what rounding one
column does to a matrix's products is compensated in the columns not yet rounded, as far as the
second moments of its inputs let it. Scales are those of method "search", chosen beforehand, and
columns come in the order of their inputs' squares.

Blocks are worked on one after another, with the hidden states that the blocks before them leave
once they are on the grid; within a block, too, each matrix sees what those before it became. A
block that is applied several times is one block: the second moments are those over all its
applications. With layer sharing of kind "first" the later applications use the query rows alone,
so that the other rows are fitted to the first application.

Memory beside the network: the hidden states of the tokens, and a few squares of the widest input.

Shapes: N sequences, T tokens, R rows, C columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mobilellm.errors import UserError
from mobilellm.model.cache import KeyValue
from mobilellm.model.linear import Linear
from mobilellm.model.network import Block, Network
from mobilellm.quantize.grid import HIGHEST, LOWEST, GridWeight
from mobilellm.quantize.rounding import search_grid

DAMPING = 0.01
"""Share of the mean squared input that is added to every column's, so that moments of few tokens
have an inverse."""
COLUMNS = 32
"""Columns whose errors are carried together into those behind them."""
AT_ONCE = 4
"""Sequences that go through a block together."""
MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""Of a block, in the order in which it applies them."""


class ReachedError(Exception):
    """The matrix observed was reached, and nothing behind it is wanted."""


class ObservedLinear(Linear):
    """A matrix that adds up the second moments of its inputs.

    With `ends` it raises `ReachedError` instead of multiplying.
    """

    def __init__(self, matrix: Linear, ends: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.weight = matrix.weight
        self.register_parameter("bias", None)
        columns = matrix.weight.shape[1]
        self.whole = torch.zeros(columns, columns)
        """(C, C) over inputs of all rows."""
        self.partial = torch.zeros_like(self.whole)
        """(C, C) over inputs of the first `partial_rows` rows alone."""
        self.partial_rows = 0
        self.ends = ends

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        self.whole.addmm_(rows.T, rows)
        if self.ends:
            raise ReachedError
        return super().forward(x)

    def first(self, x: Tensor, rows: int) -> Tensor:
        inputs = x.flatten(0, -2).float()
        self.partial.addmm_(inputs.T, inputs)
        self.partial_rows = rows
        return super().first(x, rows)


@torch.no_grad()
def gptq_blocks(
    network: Network,
    bits: Mapping[str, int],
    tokens: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, GridWeight]:
    """Put the matrices of the blocks that `bits` names onto the grid, in place; they are returned.

    The embedding must be as it is to stay. `progress(done, total)` counts blocks. `UserError` for a
    network whose blocks are not applied one after the other: their inputs depend on later blocks.
    """
    if network.config.layer_repeats > 1 and network.config.layer_order != "immediate":
        raise UserError(
            f'gptq: layer_order = "{network.config.layer_order}" applies a block again after '
            "others",
            hint="choose --method search, or unroll it first with `mobilellm convert --to hf`",
        )
    states = network.embed_tokens(tokens)  # (N, T, C)
    rotation = network.rotation(0, tokens.shape[1])
    found: dict[str, GridWeight] = {}
    for number, layer in enumerate(network.layers):
        block = cast(Block, layer)
        for path in MATRICES:
            name = f"layers.{number}.{path}.weight"
            if name not in bits:
                continue
            parent, _, leaf = path.rpartition(".")
            owner = block.get_submodule(parent)
            matrix = cast(Linear, getattr(owner, leaf))
            observed = ObservedLinear(matrix, ends=network.config.layer_repeats == 1)
            setattr(owner, leaf, observed)
            try:
                for part in states.split(AT_ONCE):
                    with contextlib.suppress(ReachedError):
                        _apply(network, block, part, rotation)
            finally:
                setattr(owner, leaf, matrix)
            found[name] = _fitted(matrix.weight, bits[name], observed)
            matrix.weight.copy_(found[name].dequantized())
        states = torch.cat(
            [_apply(network, block, part, rotation) for part in states.split(AT_ONCE)]
        )
        if progress is not None:
            progress(number + 1, len(network.layers))
    return found


def _apply(
    network: Network, block: Block, states: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """A block with its repeats, as `Network.hidden` applies it: (N, T, C) -> the same."""
    shared: KeyValue | None = None
    for _ in range(network.config.layer_repeats):
        states, key_value = block(states, rotation, None, True, None, 0, shared)
        if network.config.shared_kv == "first":
            shared = key_value
    return states


def _fitted(values: Tensor, bits: int, observed: ObservedLinear) -> GridWeight:
    """A matrix on the grid, its rows by the inputs that each of them has."""
    count = observed.partial_rows
    if not count:
        return gptq_grid(values, bits, observed.whole)
    upper = gptq_grid(values[:count], bits, observed.whole + observed.partial)
    lower = gptq_grid(values[count:], bits, observed.whole)
    return GridWeight(
        integers=torch.cat((upper.integers, lower.integers)),
        scales=torch.cat((upper.scales, lower.scales)),
        bits=bits,
    )


def gptq_grid(values: Tensor, bits: int, moments: Tensor) -> GridWeight:
    """Values (R, C) on the grid, for inputs with these second moments (C, C), not normalized."""
    scales = search_grid(values, bits).scales
    columns = values.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    # Columns are rows here, so that each lies together in memory: (C, R).
    left = values.detach().float().T[order].contiguous()  # what is still to be rounded
    steps = scales.T.repeat_interleave(columns // scales.shape[1], 0)[order].contiguous()
    upper = _inverse_root(moments[order][:, order])
    chosen = torch.empty_like(left)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        errors = torch.empty(end - start, left.shape[1])
        for i in range(start, end):
            column = left[i].div(steps[i]).round_().clamp_(LOWEST[bits], HIGHEST[bits])
            chosen[i] = column
            error = torch.sub(left[i], column.mul_(steps[i]), out=errors[i - start])
            error.div_(upper[i, i])
            left[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    integers = torch.empty(left.T.shape, dtype=torch.int8)
    integers[:, order] = chosen.T.to(torch.int8)
    return GridWeight(integers=integers, scales=scales, bits=bits)


def _inverse_root(moments: Tensor) -> Tensor:
    """The upper triangle U with U.T @ U the inverse of the damped moments, (C, C)."""
    moments = moments.clone()
    diagonal = moments.diagonal()
    damping = DAMPING * float(diagonal.mean())
    while True:
        # A column without inputs gets the damping alone; without any inputs all are alike.
        diagonal.add_(damping or 1.0)
        root, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed):
            inverse = torch.cholesky_inverse(root)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper
        damping = 10 * (damping or 1.0)
