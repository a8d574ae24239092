"""Activations rounded to 8 bits before they enter a product, as runtimes do it.

    rounded_activations(network, quantized)       # in place; only where the scheme asks for it
    fake_int8(x)                                  # (..., C) -> the same, each token on 256 steps

A runtime of 8-bit activations takes each token's smallest and largest number, lays 256 steps
between them with one at 0, and multiplies integers (ExecuTorch's XNNPACK: dynamic, per token,
asymmetric). The product of the integers is exact, so that rounded activations in a float product
give what such a runtime computes. onnxruntime's DynamicQuantizeLinear lays the steps over all
tokens of a call: with one token a call it is the same, with a whole prompt coarser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobilellm.model.fused import in_type
from mobilellm.model.linear import Linear
from mobilellm.model.network import Network, RMSNorm
from mobilellm.quantize.quantized import Quantized

LEVELS = 255
LOWEST_LEVEL = -128


def fake_int8(x: Tensor) -> Tensor:
    """x (..., C) with each token's numbers on 256 steps from its smallest to its largest one."""
    exact = x.float()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (LOWEST_LEVEL - low / scale).round()
    steps = ((exact / scale).round() + zero).clamp(LOWEST_LEVEL, LOWEST_LEVEL + LEVELS)
    return in_type((steps - zero) * scale, x.dtype)


class RoundedLinear(Linear):
    """A matrix whose inputs are rounded to 8 bits."""

    def __init__(self, matrix: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = matrix.in_features, matrix.out_features
        self.weight = matrix.weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(fake_int8(x))

    def first(self, x: Tensor, rows: int) -> Tensor:
        return super().first(fake_int8(x), rows)


class RoundedNorm(RMSNorm):
    """A norm whose result is rounded to 8 bits: the last one, before the output layer."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return fake_int8(super().forward(x))


def rounded_activations(network: Network, quantized: Quantized | None) -> Network:
    """Let the network round activations wherever the scheme does, in place; it is returned.

    That is before every matrix on the grid. The last norm stands for the output layer, so that
    whoever multiplies hidden states by the output layer need not know. Parameters and their names
    stay. Rounding has no gradient: such a network is for evaluation.
    """
    if quantized is None or quantized.kind.activations == "float":
        return network
    for name, module in list(network.named_modules()):
        if type(module) is Linear and f"{name}.weight" in quantized.weights and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, RoundedLinear(module))
    tied = network.lm_head is None
    if ("embed_tokens.weight" if tied else "lm_head.weight") in quantized.weights and type(
        network.norm
    ) is RMSNorm:
        network.norm = RoundedNorm(network.norm)
    return network
