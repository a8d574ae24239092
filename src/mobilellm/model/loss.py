"""Cross-entropy of a linear output layer without the whole (tokens x vocabulary) logits in memory.

The forward pass walks over the tokens in chunks; each chunk's logits give its share of the loss and, at once, of both
gradients, in three matrix products and one chunk of memory. The backward pass only scales what was computed. So the
plain way's logits, log-softmax and gradient (three times tokens x vocabulary floats) shrink to one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.linear import linear

CHUNK_NUMBERS = 1 << 22  # logits held at once: 16 MiB in float32
IGNORED = -100  # the target that counts for nothing, as in torch's cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, z_loss: float
    ) -> Tensor:
        """Sum of the losses, float32. hidden (N, C), weight (V, C), targets (N,); products in `dtype`."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = max(16, CHUNK_NUMBERS // weight.shape[0])
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            h, t = hidden[start : start + rows].to(dtype), targets[start : start + rows]
            logits = linear(h, w).float()  # (rows, V)
            counted = t != IGNORED
            index = t.where(counted, 0).unsqueeze(1)
            peak = logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, index) - peak
            probabilities = logits.sub_(peak).exp_()  # in place: the logits are not needed again
            total = probabilities.sum(dim=1, keepdim=True)
            log_total = total.log()
            loss += ((log_total - chosen).squeeze(1) * counted).sum()
            if not (need_hidden or need_weight):
                continue
            # d z_loss log_z^2 / d logit = 2 z_loss log_z p, which only stretches the softmax's share of the gradient.
            stretch = 1 + 2 * z_loss * (log_total + peak) if z_loss else 1
            probabilities.mul_(counted.unsqueeze(1) * stretch / total)
            probabilities.scatter_add_(1, index, -counted.unsqueeze(1).to(probabilities.dtype))
            grad = probabilities.to(dtype)  # d loss / d logits
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = grad @ w
            if need_weight:
                if grad_weight is None:
                    grad_weight = (grad.t() @ h).float()
                elif dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), h)
                else:
                    grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
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


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", z_loss: float = 0.0
) -> Tensor:
    """cross_entropy(hidden @ weight.T, targets) with targets of -100 ignored. hidden (N, C), weight (V, C), targets (N,).

    `reduction`: "mean" over the targets that count, "sum", or "none" (which gives (N,) and no gradient: it is for scoring).
    Under autocast the products run in its precision; the softmax is float32 always. The gradient, not the value, is that of
    the cross-entropy plus `z_loss` times log(sum(exp(logits)))^2.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if reduction == "none":
        with torch.no_grad():
            rows = max(16, CHUNK_NUMBERS // weight.shape[0])
            w = weight.to(dtype)
            pieces = [
                F.cross_entropy(
                    linear(h.to(dtype), w).float(), t, reduction="none", ignore_index=IGNORED
                )
                for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
            ]
            return torch.cat(pieces)
    with torch.autocast(device, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, dtype, z_loss)
    return total if reduction == "sum" else total / (targets != IGNORED).sum().clamp(min=1)
