"""GPTQ on the portable grid: integers chosen column by column, each column's error made up for.

    weights = gptq_blocks(network, bits, tokens, embedded)     # tokens (N, T) of a calibration text

The method is that of Frantar, Ashkboos, Hoefler and Alistarh (arXiv 2210.17323): what rounding one
column does to a matrix's products is compensated in the columns not yet rounded, as far as the
second moments of its inputs let it. Columns come in the order of their inputs' squares.

Four things are done beside it, each of which lowers the loss (docs/log.md):

- Scales have the least squared error with each column weighed by its inputs' squares, not by 1.
- The goal of a matrix is its product in the network as it was, with the inputs that it had there:
  the least-squares change of the matrix that reaches it from the inputs on the grid is made before
  rounding (as by Arai and Ichikawa, arXiv 2504.09629, and Li et al., arXiv 2504.02692).
- Where a product is added to the residual stream, its goal is the stream as it was, so that it
  makes up for what the matrices before it have left there.
- Scales are fitted again, by least squares, to the integers that were chosen.

`SHARE` of the change is made, and less the fewer tokens there are for each column: they do not say
what all of it would do to others.

Blocks are worked on one after another, with the hidden states that the blocks before them leave
once they are on the grid; within a block, too, each matrix sees what those before it became. A
block that is applied several times is one block: sums are taken over all its applications. With
layer sharing of kind "first" the later applications use the query rows alone, so that the other
rows are fitted to the first application.

Memory beside the network: the hidden states of the tokens, twice, what enters one block's matrices,
a copy of one block, and a few squares of the widest input.

Shapes: N sequences, T tokens, R rows, C columns, G groups of a row.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mobilellm.budget import ask
from mobilellm.errors import UserError
from mobilellm.model.attention_mask import DocumentMask, attention_mask
from mobilellm.model.cache import KeyValue
from mobilellm.model.linear import Linear
from mobilellm.model.network import Block, Network, RMSNorm
from mobilellm.quantize.grid import HIGHEST, LOWEST, GridWeight, dequantized, portable
from mobilellm.quantize.rounding import search_grid

DAMPING = 0.01
"""Share of the mean squared input that is added to every column's, so that moments of few tokens
have an inverse."""
SHARE = 0.5
"""Of the least-squares change towards a matrix's goal, what many tokens let be made."""
COLUMNS = 32
"""Columns whose errors are carried together into those behind them."""
AT_ONCE = 4
"""Sequences that go through a block together."""
SWEEPS = 3
"""How often each scale is fitted to the integers, given the others."""
MATRICES = {
    "self_attn.qkv_proj": None,
    "self_attn.o_proj": "input_layernorm",
    "mlp.gate_up_proj": None,
    "mlp.down_proj": "post_attention_layernorm",
}
"""Of a block, in the order in which it applies them; with the norm that reads the residual stream
to which a matrix's product is added."""


class ReachedError(Exception):
    """The matrix observed was reached, and nothing behind it is wanted."""


class ObservedLinear(Linear):
    """A matrix that gives what enters it, (tokens, C), and how many of its rows take it to a
    function, before it multiplies."""

    def __init__(self, matrix: Linear, seen: Callable[[Tensor, int], None]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.weight = matrix.weight
        self.register_parameter("bias", None)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen(x.flatten(0, -2), self.out_features)
        return super().forward(x)

    def first(self, x: Tensor, rows: int) -> Tensor:
        self.seen(x.flatten(0, -2), rows)
        return super().first(x, rows)


class Sums:
    """What the inputs of some rows of a matrix say of them, summed over tokens."""

    def __init__(self, rows: int, columns: int) -> None:
        self.moments = torch.zeros(columns, columns)
        """Second moments of the inputs, (C, C)."""
        self.owed = torch.zeros(rows, columns)
        """What the products of the matrix lack of their goals, times the inputs, (R, C)."""
        self.tokens = 0
        """How many there were."""

    def add(self, inputs: Tensor, lacking: Tensor) -> None:
        """Inputs (tokens, C), and what the products lack of their goals, (tokens, R)."""
        self.moments.addmm_(inputs.T, inputs)
        self.owed.addmm_(lacking.T, inputs)
        self.tokens += len(inputs)

    def rows(self, start: int, stop: int | None) -> Sums:
        """Those of some of the rows alone, without copying."""
        part = copy.copy(self)
        part.owed = self.owed[start:stop]
        return part

    def __add__(self, other: Sums) -> Sums:
        both = copy.copy(self)
        both.moments, both.owed = self.moments + other.moments, self.owed + other.owed
        both.tokens = self.tokens + other.tokens
        return both


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was read in a block as some sequences went through it, application by application."""

    inputs: dict[str, list[Tensor]]
    """By the path of a matrix, (tokens, C)."""
    streams: dict[str, list[Tensor]]
    """The residual stream, by the name of the norm that reads it, (tokens, width)."""


@torch.no_grad()
def gptq_blocks(
    network: Network,
    bits: Mapping[str, int],
    tokens: Tensor,
    embedded: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, GridWeight]:
    """Put the matrices of the blocks that `bits` names onto the grid, in place; they are returned.

    The embedding must be as it is to stay; `embedded` (N, T, width) are the tokens' rows of the one
    that it was. `progress(done, total)` counts blocks. `UserError` as `check_gptq`.
    """
    check_gptq(network, tokens)
    states = network.embed_tokens(tokens)  # (N, T, width)
    rotation = network.rotation(0, tokens.shape[1])
    found: dict[str, GridWeight] = {}
    for number, layer in enumerate(network.layers):
        block = cast(Block, layer)
        spec = network.config.attention_specs[number].within(tokens.shape[1])
        mask = attention_mask(spec, 0, tokens.shape[1], tokens.device)
        as_it_was = copy.deepcopy(block)
        wanted = []
        goals = []
        for part in embedded.split(AT_ONCE):
            with _reading(as_it_was) as readings:
                wanted.append(_apply(network, as_it_was, part, rotation, mask))
            goals.append(readings)
        embedded = torch.cat(wanted)
        for path in MATRICES:
            name = f"layers.{number}.{path}.weight"
            if name not in bits:
                continue
            matrix = cast(Linear, block.get_submodule(path))
            observed = _Observed(block, path)
            for part, goal in zip(states.split(AT_ONCE), goals, strict=True):
                with observed.beside(goal), contextlib.suppress(ReachedError):
                    _apply(network, block, part, rotation, mask)
            found[name] = observed.fitted(bits[name])
            matrix.weight.copy_(found[name].dequantized())
        states = torch.cat(
            [_apply(network, block, part, rotation, mask) for part in states.split(AT_ONCE)]
        )
        if progress is not None:
            progress(number + 1, len(network.layers))
    return found


def check_gptq(network: Network, tokens: Tensor) -> None:
    """`UserError` for a network whose blocks are not applied one after the other, since their
    inputs depend on later blocks, and where what gptq holds of `tokens` (N, T) does not fit into
    memory."""
    config = network.config
    if config.layer_repeats > 1 and config.layer_order != "immediate":
        raise UserError(
            f'gptq: layer_order = "{config.layer_order}" applies a block again after others',
            hint="choose --method search, or unroll it first with `mobilellm convert --to hf`",
        )
    readings = 4 * config.hidden_size + config.num_attention_heads * config.head_dim
    numbers = config.layer_repeats * (readings + config.intermediate_size)
    numbers += 4 * config.hidden_size  # hidden states on the grid and as they were, old and new
    ask(4 * tokens.numel() * numbers, "gptq: what enters the matrices of a block")


def _apply(
    network: Network,
    block: Block,
    states: Tensor,
    rotation: tuple[Tensor, Tensor],
    mask: tuple[DocumentMask | None, bool],
) -> Tensor:
    """A block with its repeats, as `Network.hidden` applies it: (N, T, width) -> the same."""
    shared: KeyValue | None = None
    for _ in range(network.config.layer_repeats):
        states, key_value = block(states, rotation, *mask, None, 0, shared)
        if network.config.shared_kv == "first":
            shared = key_value
    return states


@contextlib.contextmanager
def _observed(block: Block, path: str, seen: Callable[[Tensor, int], None]) -> Iterator[None]:
    """Let a matrix of the block tell what enters it."""
    parent, _, leaf = path.rpartition(".")
    owner = block.get_submodule(parent)
    matrix = cast(Linear, getattr(owner, leaf))
    setattr(owner, leaf, ObservedLinear(matrix, seen))
    try:
        yield
    finally:
        setattr(owner, leaf, matrix)


@contextlib.contextmanager
def _watched(block: Block, norm: str, seen: Callable[[Tensor], None]) -> Iterator[None]:
    """Let a norm of the block tell the stream that it reads, (tokens, width)."""

    def before(module: nn.Module, given: tuple[Tensor]) -> None:
        seen(given[0].flatten(0, -2))

    hook = cast(RMSNorm, block.get_submodule(norm)).register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _reading(block: Block) -> Iterator[Readings]:
    """Read what enters all matrices of the block, and its streams."""
    readings = Readings(
        inputs={path: [] for path in MATRICES},
        streams={norm: [] for norm in MATRICES.values() if norm is not None},
    )
    with contextlib.ExitStack() as stack:
        for path, inputs in readings.inputs.items():
            stack.enter_context(_observed(block, path, _kept(inputs)))
        for norm, streams in readings.streams.items():
            stack.enter_context(_watched(block, norm, streams.append))
        yield readings


def _kept(inputs: list[Tensor]) -> Callable[[Tensor, int], None]:
    return lambda x, rows: inputs.append(x)


class _Observed:
    """Sums over what enters one matrix of a block, beside what entered it in the block as it was.

    Rows that take the later applications' inputs, too, have sums of their own for these.
    """

    def __init__(self, block: Block, path: str) -> None:
        self.block, self.path = block, path
        self.matrix = cast(Linear, block.get_submodule(path))
        rows, columns = self.matrix.weight.shape
        self.whole = Sums(rows, columns)
        self.partial: Sums | None = None

    @contextlib.contextmanager
    def beside(self, goal: Readings) -> Iterator[None]:
        """While sequences go through the block whose `goal` was read before."""
        norm = MATRICES[self.path]
        given = goal.inputs[self.path]
        stream: list[Tensor] = []
        applied = 0

        def seen(x: Tensor, rows: int) -> None:
            nonlocal applied
            lacking = (given[applied] - x) @ self.matrix.weight[:rows].T
            if norm is not None:
                lacking += goal.streams[norm][applied] - stream[applied]
            self._sums(rows).add(x, lacking)
            applied += 1
            if applied == len(given):
                raise ReachedError

        with contextlib.ExitStack() as stack:
            if norm is not None:
                stack.enter_context(_watched(self.block, norm, stream.append))
            stack.enter_context(_observed(self.block, self.path, seen))
            yield

    def _sums(self, rows: int) -> Sums:
        if rows == len(self.matrix.weight):
            return self.whole
        if self.partial is None:
            self.partial = Sums(rows, self.matrix.weight.shape[1])
        return self.partial

    def fitted(self, bits: int) -> GridWeight:
        """The matrix on the grid, its rows by the inputs that each of them has."""
        values = self.matrix.weight.detach()
        if self.partial is None:
            return _fitted(values, bits, self.whole)
        count = len(self.partial.owed)
        upper = _fitted(values[:count], bits, self.whole.rows(0, count) + self.partial)
        lower = _fitted(values[count:], bits, self.whole.rows(count, None))
        return GridWeight(
            integers=torch.cat((upper.integers, lower.integers)),
            scales=torch.cat((upper.scales, lower.scales)),
            bits=bits,
        )


def _fitted(values: Tensor, bits: int, sums: Sums) -> GridWeight:
    return gptq_grid(towards_goal(values, sums), bits, sums.moments)


def towards_goal(values: Tensor, sums: Sums) -> Tensor:
    """Values (R, C) after a share of the least-squares change towards the goals of their
    products."""
    share = SHARE * sums.tokens / (sums.tokens + values.shape[1])
    root = _damped_root(sums.moments)
    return values + share * torch.cholesky_solve(sums.owed.T.contiguous(), root).T


def gptq_grid(values: Tensor, bits: int, moments: Tensor) -> GridWeight:
    """Values (R, C) on the grid, for inputs with these second moments (C, C), not normalized."""
    scales = search_grid(values, bits, moments.diagonal() + (_damping(moments) or 1.0)).scales
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
    return GridWeight(
        integers=integers, scales=fitted_scales(values, integers, scales, moments), bits=bits
    )


def fitted_scales(values: Tensor, integers: Tensor, scales: Tensor, moments: Tensor) -> Tensor:
    """Portable scales (R, G) at which the integers' products are nearer to those of the values than
    at the ones given: one group after another takes its least-squares scale, the others fixed.
    Moments are damped, so that a group whose inputs were next to nothing keeps its scale."""
    moments = moments.clone()
    moments.diagonal().add_(_damping(moments) or 1.0)
    groups = scales.shape[1]
    width = values.shape[1] // groups
    scales = scales.clone()
    owns = [slice(group * width, (group + 1) * width) for group in range(groups)]
    curvatures = []
    for own in owns:
        numbers = integers[:, own].float()
        curvatures.append((numbers @ moments[own, own]).mul_(numbers).sum(1))
    error = (values.float() - dequantized(integers, scales)) @ moments  # (R, C)
    for _ in range(SWEEPS):
        for group, (own, curvature) in enumerate(zip(owns, curvatures, strict=True)):
            numbers = integers[:, own].float()
            slope = (error[:, own] * numbers).sum(1)
            step = portable(scales[:, group] + slope / curvature.clamp_min(1e-30)).sub_(
                scales[:, group]
            )
            # A scale of 8 bits may lie on the far side of the best one.
            step.mul_(step * (2 * slope - step * curvature) > 0)
            scales[:, group] += step
            error.addmm_(step.unsqueeze(1) * numbers, moments[own], alpha=-1)
    return scales


def _damping(moments: Tensor) -> float:
    return DAMPING * float(moments.diagonal().mean())


def _damped_root(moments: Tensor) -> Tensor:
    """The lower Cholesky triangle of moments (C, C), damped as far as they need it."""
    moments = moments.clone()
    damping = _damping(moments)
    while True:
        # A column without inputs gets the damping alone; without any inputs all are alike.
        moments.diagonal().add_(damping or 1.0)
        root, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed):
            return root
        damping = 10 * (damping or 1.0)


def _inverse_root(moments: Tensor) -> Tensor:
    """The upper triangle U with U.T @ U the inverse of the damped moments, (C, C)."""
    damping = 0.0
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damping)
        root = _damped_root(damped)
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
        if not int(failed):
            return upper
        damping = 10 * damping or float(moments.diagonal().mean())
