"""x @ W.T, by the fastest of what there is for it on a CPU.

In float32 `F.linear` takes MKL. Without gradients oneDNN does the same product: 1.2 times as fast
for 1,024 rows of a 125M model's blocks, and twice as fast for some 64 rows of its output layer
(docs/log.md). In training kernels/products.py says which, and in scoring `scoring_products`.
Everything else is `F.linear`."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.kernels import products
from mobilellm.kernels.products import fastest_products, onednn_linear
from mobilellm.model.config import ModelConfig

MANY_ROWS = 16384
"""From so many rows of a matrix on, as an output layer has, oneDNN is the faster one for a single
row of x too; below it is up to forty times slower than a product with a vector (docs/log.md)."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times the transpose of weight (out, in): (..., out)."""
    if (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and (product := onednn_linear()) is not None
    ):
        if (found := products.output_product(x, weight)) is not None:
            return found
        if x.numel() == x.shape[-1] and weight.shape[0] < MANY_ROWS:
            return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return product(x.contiguous(), weight.contiguous(), None, "none", [], "")
    if torch.is_grad_enabled() and (trained := products.product(x, weight)) is not None:
        return trained
    return F.linear(x, weight)


def block_products(config: ModelConfig, rows: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of the products of a block of gated feed-forward with so many
    rows."""
    wide, head = config.hidden_size, config.head_dim
    heads, grouped = config.num_attention_heads, config.num_key_value_heads
    return [
        (rows, wide, (heads + 2 * grouped) * head),
        (rows, heads * head, wide),
        (rows, wide, 2 * config.intermediate_size),
        (rows, config.intermediate_size, wide),
    ]


def scoring_products(config: ModelConfig, rows: int) -> contextlib.AbstractContextManager[None]:
    """The context in which float32 products of a network on a CPU, without gradients, are bf16x6's
    where these are the fastest there are for rows of its blocks; what is measured is remembered
    (kernels/products.py)."""
    if fastest_products(block_products(config, rows)) == "bf16x6":
        return products.using("bf16x6")
    return contextlib.nullcontext()


class Linear(nn.Linear):
    """A matrix without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def first(self, x: Tensor, rows: int) -> Tensor:
        """The product with the first `rows` rows alone: (..., in) -> (..., rows)."""
        return linear(x, self.weight[:rows])

    def product(self, x: Tensor) -> Tensor:
        """x times the matrix as an output layer: (..., in) -> (..., out)."""
        return linear(x, self.used_weight)

    @property
    def used_weight(self) -> Tensor:
        """The matrix that enters products, (out, in); a module that rounds has another than
        `weight`."""
        return self.weight


class Embedding(nn.Embedding):
    """A row for each token."""

    def product(self, x: Tensor) -> Tensor:
        """x times the rows, as an output layer that is tied to them: (..., C) -> (..., V)."""
        return linear(x, self.used_weight)

    @property
    def used_weight(self) -> Tensor:
        """The matrix whose rows are taken, (V, C); a module that rounds has another than
        `weight`."""
        return self.weight
