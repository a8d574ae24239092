"""Quantization-aware training: products see the weights on the grid, gradients pass through.

    fake_quantize(network, "int4")           # before compilation and sharding
    network.loss(inputs, targets).backward() # gradients of the float32 weights

The weights stay float32 parameters under their names. In every forward pass they are rounded as
method "round" rounds them (rounding.py), so that `quantized_network(network, scheme, "round")`
afterwards gives the very numbers that the products saw. The gradient of the rounding is taken to
be 1 (the straight-through estimator; Bengio, Leonard and Courville, arXiv 1308.3432): no scale
clips, so that no gradient has to be cut off.

With a scheme of 8-bit activations what enters a product is rounded too, token by token.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.errors import unknown_name
from mobilellm.model.linear import Embedding, Linear, linear
from mobilellm.model.network import Block, Network, RMSNorm
from mobilellm.quantize.activations import fake_int8
from mobilellm.quantize.grid import dequantized, portable, rounded
from mobilellm.quantize.methods import check_widths
from mobilellm.quantize.rounding import unclipped
from mobilellm.quantize.schemes import EMBEDDINGS, SCHEMES, Activations


class _Rounded(torch.autograd.Function):
    """Values on the grid of method "round", with the gradient of the values themselves."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bits: int) -> Tensor:
        scales = portable(unclipped(values, bits))
        return dequantized(rounded(values, scales, bits), scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _RoundedActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return fake_int8(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def on_grid(values: Tensor, bits: int) -> Tensor:
    """Values (R, C) where method "round" would put them; the gradient passes as it is."""
    result: Tensor = _Rounded.apply(values, bits)
    return result


def _entering(x: Tensor, activations: Activations) -> Tensor:
    """What enters a product: (..., C) as it is, or each token on a grid of 256 steps."""
    if activations == "float":
        return x
    result: Tensor = _RoundedActivations.apply(x)
    return result


class RoundedLinear(Linear):
    """A matrix whose products see it on the grid."""

    bits: int
    activations: Activations

    @property
    def used_weight(self) -> Tensor:
        """The matrix on the grid."""
        return on_grid(self.weight, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return linear(_entering(x, self.activations), self.used_weight)

    def first(self, x: Tensor, rows: int) -> Tensor:
        """As `Linear.first`."""
        return linear(_entering(x, self.activations), on_grid(self.weight[:rows], self.bits))


class RoundedEmbedding(Embedding):
    """An embedding of 8 bits, a scale a row: a row can be rounded without the others."""

    @property
    def used_weight(self) -> Tensor:
        """All rows on the grid."""
        return on_grid(self.weight, 8)

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        return on_grid(rows.flatten(0, -2), 8).view(rows.shape)


class RoundedNorm(RMSNorm):
    """A norm whose result is rounded, since it enters the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        return _entering(super().forward(x), "int8")


def fake_quantize(network: Network, scheme: str, embedding: str = "int8") -> None:
    """Let every product of `network` see its weights on the grid of `scheme`, in place.

    `embedding` "float" leaves the embedding and the output layer as they are. Parameters keep their
    names and values. `UserError` for unknown names and for widths that groups do not divide.
    """
    if scheme not in SCHEMES:
        raise unknown_name("scheme", scheme, SCHEMES)
    if embedding not in EMBEDDINGS:
        raise unknown_name("embedding", embedding, EMBEDDINGS)
    kind = SCHEMES[scheme]
    names = [name for name, p in network.named_parameters() if p.ndim == 2]
    blocks = {name: kind.bits for name in names if name.startswith("layers.")}
    check_widths(network, blocks)
    for layer in network.layers:
        block = cast(Block, layer)
        for owner, name in (
            (block.self_attn, "qkv_proj"),
            (block.self_attn, "o_proj"),
            (block.mlp, "gate_up_proj"),
            (block.mlp, "down_proj"),
        ):
            setattr(owner, name, _rounded(getattr(owner, name), kind.bits, kind.activations))
    if embedding == "float":
        return
    network.embed_tokens = _like(RoundedEmbedding, network.embed_tokens)
    if network.lm_head is not None:
        network.lm_head = _rounded(network.lm_head, 8, "float")
    if kind.activations == "int8":
        norm = RoundedNorm(network.norm.weight.shape[0], network.norm.eps)
        norm.weight = network.norm.weight
        network.norm = norm


def _rounded(module: Linear, bits: int, activations: Activations) -> RoundedLinear:
    found = _like(RoundedLinear, module)
    found.bits, found.activations = bits, activations
    return found


def _like(kind: Any, module: Linear | Embedding) -> Any:
    """A module of another kind over the same parameter."""
    rows, columns = module.weight.shape
    with torch.device("meta"):
        found = kind(columns, rows) if issubclass(kind, Linear) else kind(rows, columns)
    found.weight = module.weight
    return found
