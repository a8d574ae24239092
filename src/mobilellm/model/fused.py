"""RMSNorm and SwiGLU with backward passes of their own: they keep less and do it in fewer passes
over memory.

Autograd would keep every intermediate (for SwiGLU the gate, its sigmoid's product and the up
projection; for RMSNorm the normalized input beside the input) and walk over each again. Here only
the input is kept, and what is cheap is computed anew. torch.compile sees through both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobilellm.kernels import gpu


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a type, as the last operation of a torch.autograd.Function's forward pass.

    torch 2.11 compiles such a function to one whose gradients are 0, in silence, where its last
    operation gives back what it got: a `to` that has nothing to do, or one in place.
    """
    return x if x.dtype == dtype else x.to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = x32 * scale
        # Not in place where it is compiled, for the reason that `in_type` has.
        normed = normed * weight if torch.compiler.is_compiling() else normed.mul_(weight)
        return in_type(normed, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].float(), x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        mean = (grad * normed).mean(-1, keepdim=True)
        return ((grad - normed * mean) * scale).to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if gate_up.is_cuda and gate_up.dtype != torch.float64 and gpu.loaded():
            result: Tensor = torch.ops.mobilellm.swiglu_backward(gate_up, grads[0])
            return result
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        grad_gate = grads[0] * up * (sigmoid + silu * (1 - sigmoid))
        return torch.cat((grad_gate, grads[0] * silu), dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32, returned in x's type (arXiv
    1910.07467)."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 F) -> (..., F), gate in the first half (arXiv 2002.05202)."""
    return _SwiGLU.apply(gate_up)
