"""Weights held in memory as they are stored: bf16, or the integers of a quantized model.

    pack(network, quantized)                      # in place
    network.hidden(ids), network.output(hidden)   # as before, in a quarter or half of the memory

The products of many tokens take a matrix in float32 (in bf16 under autocast) that is made for the
product and dropped, so that they are those of the dequantized network to the last bit. Single
tokens are the business of decoding/decoder.py, which multiplies the numbers as they lie here.
Where there is no compiler for it, matrices on the grid are packed for torch's own kernels as well
(`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`), which then compute a few tokens at a time.
These are fast for bf16 activations alone, so that such a product's input and result are bf16.

Shapes: R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model.linear import Embedding, Linear, linear
from mobilellm.model.network import Network
from mobilellm.quantize.activations import RoundedLinear, fake_int8
from mobilellm.quantize.grid import GROUP, GridWeight, dequantized
from mobilellm.quantize.quantized import Quantized

Kind = Literal["bf16", "int8", "int4"]
HALF = GROUP // 2
ROWS_AT_ONCE = 4096
"""Of an output layer: its whole matrix in float32 would be the largest thing in memory."""
KERNEL_TOKENS = 4
"""The most tokens that torch's kernels for integers compute."""
KERNEL_ROWS = 16
"""torch's 4-bit kernel takes multiples of so many rows."""


class Held(nn.Module):
    """A matrix (R, C) as it is held."""

    numbers: Tensor
    """bf16 (R, C), int8 (R, C), or of int4 uint8 (R, C / 2): byte j of a group of 32 has column j
    in its low half and column j + 16 in its high one, each plus 8."""
    scales: Tensor
    """float32: (R, 1) of int8, (R, G) of int4, empty of bf16."""

    def __init__(self, weight: Tensor | GridWeight) -> None:
        """Of a float matrix its bf16 numbers, of one on the grid its integers and scales."""
        super().__init__()
        self.kind: Kind
        if isinstance(weight, GridWeight):
            self.kind = "int4" if weight.bits == 4 else "int8"
            self.rows, self.columns = weight.integers.shape
            numbers = _nibbles(weight.integers) if self.kind == "int4" else weight.integers
            scales = weight.scales.float()
        else:
            self.kind, (self.rows, self.columns) = "bf16", weight.shape
            numbers, scales = weight.detach().to(torch.bfloat16), torch.empty(0)
        self.register_buffer("numbers", numbers.contiguous(), persistent=False)
        self.register_buffer("scales", scales.contiguous(), persistent=False)
        self.kernel: tuple[Tensor, Tensor] | None = None
        """Numbers and scales as torch's own kernel takes them."""

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` in float32, exact."""
        return self._dense(self.numbers[start:stop], self.scales[start:stop])

    def of_tokens(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, (...) -> (..., C), in float32."""
        flat = ids.flatten()
        scales = self.scales[flat] if self.scales.numel() else self.scales
        return self._dense(self.numbers[flat], scales).view(*ids.shape, self.columns)

    def _dense(self, numbers: Tensor, scales: Tensor) -> Tensor:
        if numbers.is_floating_point():
            return numbers.float()
        return dequantized(_integers(numbers) if self.kind == "int4" else numbers, scales)

    def product(self, x: Tensor, rows: int | None = None) -> Tensor:
        """x (..., C) times the transpose of the first `rows` rows, or of all."""
        rows = self.rows if rows is None else rows
        if self.kernel is not None and x.numel() <= KERNEL_TOKENS * self.columns:
            return self._by_kernel(x, rows)
        if self.numbers.is_floating_point() and torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.numbers[:rows])
        if rows <= 2 * ROWS_AT_ONCE:
            return linear(x, self.dense(0, rows))
        starts = range(0, rows, ROWS_AT_ONCE)
        parts = [linear(x, self.dense(i, min(rows, i + ROWS_AT_ONCE))) for i in starts]
        return torch.cat(parts, dim=-1)

    def prepare_kernel(self) -> bool:
        """Pack for torch's own kernel too; false where there is none for this matrix."""
        if not torch.equal(self.scales, self.scales.to(torch.bfloat16).float()):
            return False  # it would round them
        if self.kind == "int8":
            self.kernel = self.numbers, self.scales[:, 0].to(torch.bfloat16)
        elif self.kind == "int4" and self.rows % KERNEL_ROWS == 0:
            # It counts from 0 to 15 where the grid goes from -8 to 7, as our bytes do, and takes a
            # zero point beside each scale: (G, R, 2).
            both = torch.stack((self.scales, torch.zeros_like(self.scales)), dim=-1)
            shifted = _integers(self.numbers).to(torch.int32) + 8
            numbers = torch.ops.aten._convert_weight_to_int4pack_for_cpu(shifted, 1)
            self.kernel = numbers, both.transpose(0, 1).to(torch.bfloat16).contiguous()
        return self.kernel is not None

    def _by_kernel(self, x: Tensor, rows: int) -> Tensor:
        assert self.kernel is not None
        numbers, scales = self.kernel
        flat = x.reshape(-1, self.columns).to(torch.bfloat16)
        if self.kind == "int4":
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, numbers, GROUP, scales)
        else:
            found = torch.ops.aten._weight_int8pack_mm(flat, numbers, scales)
        return found[:, :rows].to(x.dtype).reshape(*x.shape[:-1], rows)


def _nibbles(integers: Tensor) -> Tensor:
    """Integers (R, C) from -8 to 7 as bytes (R, C / 2), in the order that `Held` says."""
    groups = (integers + 8).view(torch.uint8).view(len(integers), -1, 2, HALF)
    return (groups[:, :, 0] | groups[:, :, 1] << 4).flatten(1)


def _integers(nibbles: Tensor) -> Tensor:
    """Bytes (R, C / 2) back as integers (R, C), int8."""
    halves = nibbles.view(len(nibbles), -1, HALF)
    return torch.stack((halves & 15, halves >> 4), dim=2).flatten(1).view(torch.int8) - 8


class HeldLinear(Linear):
    """A matrix in another form than a parameter; with `rounds` its inputs are rounded to 8 bits."""

    def __init__(self, held: Held, rounds: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = held.columns, held.rows
        self.held, self.rounds = held, rounds

    def forward(self, x: Tensor) -> Tensor:
        return self.held.product(fake_int8(x) if self.rounds else x)

    def first(self, x: Tensor, rows: int) -> Tensor:
        return self.held.product(fake_int8(x) if self.rounds else x, rows)

    @property
    def used_weight(self) -> Tensor:
        return self.held.dense()


class HeldEmbedding(Embedding):
    """An embedding, and output layer where it is tied, in another form than a parameter."""

    def __init__(self, held: Held) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.held = held.rows, held.columns, held

    def forward(self, input: Tensor) -> Tensor:
        return self.held.of_tokens(input)

    def product(self, x: Tensor) -> Tensor:
        return self.held.product(x)

    @property
    def used_weight(self) -> Tensor:
        return self.held.dense()


def pack(
    network: Network, quantized: Quantized | None, *, half: bool = False, kernels: bool = False
) -> list[str]:
    """Hold the network's matrices as they are stored, in place: those on the grid as integers,
    those that are bf16 as bf16, and with `half` all others, too. Each one's float32 is given back
    before the next is taken.

    With `kernels`, matrices on the grid are packed for torch's kernels, too. Returned are the names
    of those that these kernels do not fit. Such a network is for evaluation.
    """
    grid = {} if quantized is None else quantized.weights
    unfit: list[str] = []
    for name, module in reversed(list(network.named_modules())):  # the largest, then, come last
        if not isinstance(module, (Linear, Embedding)) or not hasattr(module, "weight"):
            continue
        weight = grid.get(f"{name}.weight")
        if weight is None and not half and module.weight.dtype != torch.bfloat16:
            continue
        held = Held(module.weight if weight is None else weight)
        if kernels and weight is not None and not held.prepare_kernel():
            unfit.append(name)
        parent, _, leaf = name.rpartition(".")
        embedding = isinstance(module, Embedding)
        rounds = isinstance(module, RoundedLinear)
        new = HeldEmbedding(held) if embedding else HeldLinear(held, rounds)
        setattr(network.get_submodule(parent), leaf, new)
        del module.weight
    return unfit[::-1]
