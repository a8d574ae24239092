"""Causal attention for training in bf16 on a CPU: a few query rows at a time against the keys
before them.

torch's flash attention for CPUs walks over small tiles, which costs it more than half of a bf16
step; here the same sums (FlashAttention-2, arXiv 2307.08691: the softmax's logarithm is kept, not
the softmax) go through matrix products that are large enough for the processor's bf16 units, and
nothing above the diagonal is computed but within a block of rows. All query heads of a key head are
one product, so grouped keys are never repeated. It is an operator of its own, which torch.compile
takes as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASKED = float("-inf")


def rows_at_once(length: int) -> int:
    """Query rows a product: measured on two cores with AVX-512 BF16 (docs/log.md)."""
    return 64 if length <= 1024 else 128


@torch.library.custom_op("mobilellm::causal_attention", mutates_args=())
def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D), key and value (B, K, T, D) -> attended (B, H, T, D), log of its softmax's
    sum (B, K, H/K, T, 1)."""
    B, H, T, D = query.shape
    K, scale = key.shape[1], D**-0.5
    G = H // K
    q, k, v = query.reshape(B * K, G, T, D), key.reshape(B * K, T, D), value.reshape(B * K, T, D)
    out = _rows_first(query)
    log_total = torch.empty(B * K, G, T, 1, dtype=torch.float32)
    for start, end, above in _blocks(T):
        n = end - start
        x = _scores(q[:, :, start:end], k[:, :end], scale, above)
        total = torch.logsumexp(x, -1, keepdim=True)
        log_total[:, :, start:end] = total
        p = x.sub_(total).exp_().to(query.dtype).view(B * K, G * n, end)
        out.view(B, K, G, T, D)[:, :, :, start:end] = torch.bmm(p, v[:, :end]).view(B, K, G, n, D)
    return out, log_total.view(B, K, G, T, 1)


def _rows_first(like: Tensor) -> Tensor:
    """An empty (B, H, T, D) that lies in memory as (B, T, H, D), as the projections around
    attention have it."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def _blocks(length: int) -> list[tuple[int, int, Tensor]]:
    """(first row, row after the last, what is above the diagonal within) of each block."""
    rows = rows_at_once(length)
    found = []
    for start in range(0, length, rows):
        n = min(rows, length - start)
        found.append((start, start + n, torch.ones(n, n, dtype=torch.bool).triu(1)))
    return found


def _scores(query: Tensor, key: Tensor, scale: float, above: Tensor) -> Tensor:
    """Scaled products of a block of queries (N, G, n, D) with the keys (N, S, D) up to its end,
    masked; float32."""
    N, G, n, D = query.shape
    x = (
        torch.bmm(query.reshape(N, G * n, D), key.transpose(1, 2))
        .view(N, G, n, -1)
        .float()
        .mul_(scale)
    )
    x[..., -n:].masked_fill_(above, MASKED)
    return x


@causal_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    K = key.shape[1]
    return _rows_first(query), query.new_empty(B, K, H // K, T, 1, dtype=torch.float32)


@torch.library.custom_op("mobilellm::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, D = query.shape
    K, scale = key.shape[1], D**-0.5
    G = H // K
    q, k, v = query.reshape(B * K, G, T, D), key.reshape(B * K, T, D), value.reshape(B * K, T, D)
    go, totals = grad.reshape(B * K, G, T, D), log_total.reshape(B * K, G, T, 1)
    delta = (go.float() * out.reshape(B * K, G, T, D).float()).sum(-1, keepdim=True)
    grad_query = _rows_first(query)
    grad_key, grad_value = (torch.zeros(B * K, T, D, dtype=torch.float32) for _ in range(2))
    for start, end, above in _blocks(T):
        n = end - start
        qb, gb = (t[:, :, start:end].reshape(B * K, G * n, D) for t in (q, go))
        p = (
            _scores(q[:, :, start:end], k[:, :end], scale, above)
            .sub_(totals[:, :, start:end])
            .exp_()
        )
        grad_value[:, :end] += torch.bmm(p.to(q.dtype).view(B * K, G * n, end).transpose(1, 2), gb)
        ds = torch.bmm(gb, v[:, :end].transpose(1, 2)).view(B * K, G, n, end).float()
        ds = ds.sub_(delta[:, :, start:end]).mul_(p).mul_(scale).to(q.dtype).view(B * K, G * n, end)
        grad_query.view(B, K, G, T, D)[:, :, :, start:end] = torch.bmm(ds, k[:, :end]).view(
            B, K, G, n, D
        )
        grad_key[:, :end] += torch.bmm(ds.transpose(1, 2), qb)
    return (
        grad_query,
        grad_key.to(key.dtype).view(B, K, T, D),
        grad_value.to(value.dtype).view(B, K, T, D),
    )


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_first(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return found


causal_attention.register_autograd(_gradients, setup_context=_keep)
