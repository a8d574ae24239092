"""Losses over a linear output layer without the whole (tokens x vocabulary) logits in memory.

The forward pass walks over the tokens in chunks. Each chunk's logits give its share of the loss
and, at once, of both gradients, in three matrix products and one chunk of memory. The backward
pass only scales what was computed. So the plain way's logits, log-softmax and gradient (three
times tokens x vocabulary floats) shrink to one chunk.

    loss = linear_cross_entropy(hidden, weight, targets)           # mean nats a target
    objective = NextToken(z_loss=1e-4)
    loss = objective(network, inputs, targets) / targets.numel()   # the same, of a network

An objective is what a training step minimizes: it is called as
`objective(network, inputs, targets, documents)` and returns a sum over targets. A new one gives
`output_walk` its own `ChunkLoss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.kernels.compiling import steps_are_compiled
from mobilellm.kernels.products import add_weight_gradient, input_gradient
from mobilellm.model.linear import linear

CHUNK_NUMBERS = 1 << 24
"""Logits held at once: 64 MiB in float32. Each chunk reads the weight twice and adds to its
gradient: at 32,000 words a quarter of this number took twice the time in bf16 (docs/log.md)."""
GPU_CHUNK_NUMBERS = 1 << 28
"""The same on a GPU, 1 GiB: fewer and larger launches."""
MIN_CHUNK_ROWS = 16
IGNORED = -100
"""The target that counts for nothing, as in torch's cross_entropy."""

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits (n, V) as the product gives them, which it may overwrite; their rows among all; whether
the gradient is wanted) -> (the sum of the rows' losses in float32, its gradient by the logits
(n, V) or None)."""


class Objective(Protocol):
    """What a training step minimizes."""

    def __call__(
        self,
        network: Predictor,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """A sum over `targets` (B, T), -100 where none, after `inputs` (B, T). `beside` is what the
        data hold beside these samples, each (B, ...)."""
        ...


class Predictor(Protocol):
    """What an objective asks of a network."""

    @property
    def output_weight(self) -> Tensor:
        """The output layer, (V, C)."""
        ...

    def hidden(self, input_ids: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """The last hidden states of (B, T) tokens, (B, T, C)."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, summed over the targets that count."""

    z_loss: float = 0.0
    """Adds to the gradient, and not to the value, that of z_loss x log(sum(exp(logits)))^2 for each
    target (PaLM, arXiv 2204.02311, section 5)."""

    def __call__(
        self,
        network: Predictor,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """Nats of `targets` (B, T), -100 where none, after `inputs` (B, T): their sum, float32.

        With `documents` (B, T) a token sees its own document alone (see `Network.hidden`).
        """
        hidden = network.hidden(inputs, documents=documents).flatten(0, 1)
        return linear_cross_entropy(
            hidden, network.output_weight, targets.flatten(), "sum", self.z_loss
        )


def chunk_rows(vocab_size: int, device: str = "cpu", arrays: int = 1) -> int:
    """Tokens whose logits are held at once on a device of this type, by a loss that makes so many
    arrays of their size."""
    numbers = CHUNK_NUMBERS if device == "cpu" else GPU_CHUNK_NUMBERS
    return max(MIN_CHUNK_ROWS, numbers // arrays // vocab_size)


def even_rows(tokens: int, most: int) -> int:
    """Tokens a chunk, at most `most`, so that chunks are as alike as can be: each size that there
    is may be compiled by itself."""
    return -(-tokens // -(-tokens // most)) if tokens else most


class _OutputWalk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        chunk_loss: ChunkLoss,
        arrays: int,
    ) -> Tensor:
        """Sum of the losses, float32. hidden (N, C), weight (V, C); products in `dtype`."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        most = chunk_rows(weight.shape[0], weight.device.type, arrays)
        rows = even_rows(hidden.shape[0], most)
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            h = hidden[chunk].to(dtype)
            loss, by_logits = chunk_loss(linear(h, w), chunk, need_hidden or need_weight)
            total = total + loss  # not in place: see `in_type`
            if by_logits is None:
                continue
            grad = by_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = input_gradient(grad, w)
            if need_weight:
                grad_weight = add_weight_gradient(grad_weight, grad, h)
            del by_logits, grad  # before the next chunk has its logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        # In place: this node is walked once, and the buffers are its own.
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def output_walk(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, arrays: int = 1) -> Tensor:
    """Sum over tokens of a loss of their logits, float32, with gradients for hidden (N, C) and
    weight (V, C). A loss that makes several arrays of the logits' size gets smaller chunks.

    Under autocast the products run in its precision, and `chunk_loss` sees what they give.
    """
    dtype = products_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _OutputWalk.apply(hidden, weight, dtype, chunk_loss, arrays)
    return total


def products_dtype(hidden: Tensor) -> torch.dtype:
    """The type that products run in here: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def cross_entropy_chunk(targets: Tensor, z_loss: float = 0.0) -> ChunkLoss:
    """Cross-entropy of `targets` (N,), where -100 counts for nothing, with z_loss in the gradient
    (see `NextToken`)."""

    compiled = steps_are_compiled()

    def loss(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        t, on_gpu = targets[rows], logits.device.type == "cuda"
        if need_gradient and (fused_on_gpu() if on_gpu else compiled):
            return _fused()(logits, t, z_loss)
        logits = logits.float()
        counted = t != IGNORED
        index = t.where(counted, 0).unsqueeze(1)
        peak = logits.amax(dim=1, keepdim=True)
        chosen = logits.gather(1, index) - peak
        probabilities = logits.sub_(peak).exp_()  # in place: the logits are not needed again
        total = probabilities.sum(dim=1, keepdim=True)
        log_total = total.log()
        value = ((log_total - chosen).squeeze(1) * counted).sum()
        if not need_gradient:
            return value, None
        # d z_loss log_z^2 / d logit = 2 z_loss log_z p, which stretches the softmax's share alone.
        stretch = 1 + 2 * z_loss * (log_total + peak) if z_loss else 1
        probabilities.mul_(counted.unsqueeze(1) * stretch / total)
        probabilities.scatter_add_(1, index, -counted.unsqueeze(1).to(probabilities.dtype))
        return value, probabilities

    return loss


def _cross_entropy_and_gradient(
    logits: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """As `cross_entropy_chunk`, in a form that the compiler makes a few kernels of: logits (n, V)
    in any precision are read twice, and the gradient is written once, in that precision."""
    counted = targets != IGNORED
    index = targets.where(counted, 0).unsqueeze(1)
    exact = logits.float()
    log_z = exact.logsumexp(dim=1, keepdim=True)
    value = ((log_z - exact.gather(1, index)).squeeze(1) * counted).sum()
    probabilities = (exact - log_z).exp() * (1 + 2 * z_loss * log_z)
    chosen = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = (probabilities - chosen.float()) * counted.unsqueeze(1)
    return value, gradient.to(logits.dtype)


@functools.cache
def fused_on_gpu() -> bool:
    """Whether the compiler works here, which makes one pass of the loss on a GPU."""
    from mobilellm.hardware.probes import compiler_works

    return compiler_works(torch.device("cuda"))


@functools.cache
def _fused() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy_and_gradient, dynamic=False)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0
) -> Tensor:
    """cross_entropy(hidden @ weight.T, targets) where targets of -100 are ignored. hidden (N, C),
    weight (V, C), targets (N,).

    `reduction` is "mean" over the targets that count (0 where none does), "sum", or "none", which
    gives (N,) and no gradient: it is for scoring. Under autocast the products run in its precision;
    the softmax is float32 always. `z_loss` is that of `NextToken`.
    """
    if reduction == "none":
        with torch.no_grad():
            rows = chunk_rows(weight.shape[0], weight.device.type)
            dtype = products_dtype(hidden)
            w = weight.to(dtype)
            pieces = [
                F.cross_entropy(
                    linear(h.to(dtype), w).float(), t, reduction="none", ignore_index=IGNORED
                )
                for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
            ]
            return torch.cat(pieces)
    total = output_walk(hidden, weight, cross_entropy_chunk(targets, z_loss))
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)
