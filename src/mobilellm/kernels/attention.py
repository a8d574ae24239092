"""Causal attention for training in bf16 on a CPU: a few query rows at a time against the keys
before them.

torch's flash attention for CPUs walks over small tiles, which costs it more than half of a bf16
step; here the same sums (FlashAttention-2, arXiv 2307.08691: the softmax's logarithm is kept, not
the softmax) go through matrix products that are large enough for the processor's bf16 units, and
nothing above the diagonal is computed but within a block of rows. All query heads of a key head are
one product, so grouped keys are never repeated. What stands between the products is one pass over
a block where a compiler is at hand (`compiled`), and a chain of torch's own calls where not.

It is an operator of its own, which torch.compile takes as a whole: traced as a part of its block,
the scores of the forward pass would be kept for the backward pass, in which they are the same
product (38 MB a layer at 2,048 tokens).

With `tiles` all of it is kernels/flash.py's, twice as fast or more, and what stands here is for
machines that have no compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mobilellm.kernels import flash

MASKED = float("-inf")


def rows_at_once(length: int) -> int:
    """Query rows a product: measured on two cores with AVX-512 BF16 (docs/log.md)."""
    return 64 if length <= 1024 else 128


@torch.library.custom_op("mobilellm::causal_attention", mutates_args=())
def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    compiled: bool = False,
    tiles: bool = False,
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D), key and value (B, K, T, D) -> attended (B, H, T, D), log of its softmax's
    sum (B, K, H/K, T, 1).

    `mask` (B or 1, 1, T, T), bool, allows less than causality does; each token must see itself.
    `compiled` has the steps between the products compiled at their first use; with `tiles` it is
    kernels/flash.py's, which must be there, where heads have an even width.
    """
    B, H, T, D = query.shape
    K, scale = key.shape[1], D**-0.5
    G = H // K
    if tiles and query.shape[3] % 2 == 0:
        attended, log_total = flash.attend(query, key, value, mask)
        return attended, log_total.view(B, K, G, T, 1)
    out = flash.rows_first(query)
    q, k, v = query.reshape(B * K, G, T, D), _whole(key), _whole(value)
    log_total = torch.empty(B * K, G, T, 1, dtype=torch.float32)
    softmax = _steps(compiled)[0]
    spaces = [query.new_empty(B * K * G * rows_at_once(T) * T) for _ in range(2)]
    for start, end in _blocks(T):
        n = end - start
        x, p = (space[: B * K * G * n * end].view(B * K, G * n, end) for space in spaces)
        torch.bmm(q[:, :, start:end].reshape(B * K, G * n, D), k[:, :end].transpose(1, 2), out=x)
        _hide(x.view(B, K, G, n, end), mask, start, n)
        total, share = softmax(x.view(-1, end), p.view(-1, end), scale)
        log_total[:, :, start:end] = total.view(B * K, G, n, 1)
        torch.mul(
            torch.bmm(p, v[:, :end]).view(B, K, G, n, D),
            share.view(B, K, G, n, 1),
            out=out.view(B, K, G, T, D)[:, :, :, start:end],
        )
    return out, log_total.view(B, K, G, T, 1)


def _whole(t: Tensor) -> Tensor:
    """(B, K, T, D) as (B K, T, D) without gaps: each block of rows would copy it otherwise."""
    return t.flatten(0, 1).contiguous()


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of each block, the longest first."""
    rows = rows_at_once(length)
    for start in range((length - 1) // rows * rows, -1, -rows):
        yield start, min(start + rows, length)


def _hide(x: Tensor, mask: Tensor | None, start: int, n: int) -> None:
    """Set scores (B, K, G, n, end) of keys that a query may not see to -inf."""
    if mask is None:
        x[..., start:].masked_fill_(_above(n), MASKED)
    else:
        x.masked_fill_(~mask[:, :, start : start + n, : start + n].unsqueeze(2), MASKED)


def _hide_transposed(x: Tensor, mask: Tensor | None, start: int, n: int) -> None:
    """The same of scores that lie as (B, K, end, G, n)."""
    if mask is None:
        x[:, :, start:].masked_fill_(_above(n).t().unsqueeze(1), MASKED)
    else:
        hidden = ~mask[:, :, start : start + n, : start + n].transpose(2, 3).contiguous()
        x.masked_fill_(hidden.unsqueeze(3), MASKED)


def _above(n: int) -> Tensor:
    """True above the diagonal of (n, n)."""
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def _softmax(x: Tensor, p: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Sets p to exp(scale x - the row's largest) for x (rows, keys); returns the log of the sum of
    exp(scale x), and one over the sum of p, (rows, 1) each, float32."""
    exact = x.float() * scale
    peak = exact.amax(-1, keepdim=True)
    powers = (exact - peak).exp()
    total = powers.sum(-1, keepdim=True)
    p.copy_(powers)
    return peak + total.log(), total.reciprocal()


def _gradient_(x: Tensor, by_p: Tensor, log_total: Tensor, delta: Tensor, scale: float) -> None:
    """x (N, keys, rows) becomes the softmax of scale x over keys, and by_p, the gradient by it, the
    gradient by x. log_total and delta (N, 1, rows)."""
    p = (x.float() * scale - log_total).exp()
    by_p.copy_((by_p.float() - delta) * p * scale)
    x.copy_(p)


Steps = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., None]]


@functools.cache
def _steps(compiled: bool) -> Steps:
    """What stands between the products, forward and backward."""
    if not compiled:
        return _softmax, _gradient_
    return torch.compile(_softmax, dynamic=True), torch.compile(_gradient_, dynamic=True)


@causal_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    compiled: bool = False,
    tiles: bool = False,
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    K = key.shape[1]
    return flash.rows_first(query), query.new_empty(B, K, H // K, T, 1, dtype=torch.float32)


@torch.library.custom_op("mobilellm::causal_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_total: Tensor,
    mask: Tensor | None,
    compiled: bool,
    tiles: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if tiles and query.shape[3] % 2 == 0:
        return flash.gradients(grad, query, key, value, out, log_total, mask)
    B, H, T, D = query.shape
    K, scale = key.shape[1], D**-0.5
    G, N = H // K, B * K
    q, k, v = query.reshape(N, G, T, D), _whole(key), _whole(value)
    go, totals = grad.reshape(N, G, T, D), log_total.reshape(N, G, T)
    delta = (go.float() * out.reshape(N, G, T, D).float()).sum(-1)
    grad_query = flash.rows_first(query)
    grad_key, grad_value = (torch.zeros(N, T, D, dtype=torch.float32) for _ in range(2))
    gradient_ = _steps(compiled)[1]
    spaces = [query.new_empty(N * G * rows_at_once(T) * T) for _ in range(2)]
    for start, end in _blocks(T):
        n = end - start
        qb, gb = (t[:, :, start:end].reshape(N, G * n, D) for t in (q, go))
        # Scores lie as (keys, rows): their products with rows need no transposed copy then.
        x, by_p = (space[: N * G * n * end].view(N, end, G * n) for space in spaces)
        torch.bmm(k[:, :end], qb.transpose(1, 2), out=x)
        torch.bmm(v[:, :end], gb.transpose(1, 2), out=by_p)
        _hide_transposed(x.view(B, K, end, G, n), mask, start, n)
        gradient_(
            x,
            by_p,
            totals[:, :, start:end].reshape(N, 1, G * n),
            delta[:, :, start:end].reshape(N, 1, G * n),
            scale,
        )
        grad_value[:, :end] += torch.bmm(x, gb)
        grad_key[:, :end] += torch.bmm(by_p, qb)
        grad_query.view(B, K, G, T, D)[:, :, :, start:end] = torch.bmm(
            by_p.transpose(1, 2), k[:, :end]
        ).view(B, K, G, n, D)
    return (
        grad_query,
        grad_key.to(key.dtype).view(B, K, T, D),
        grad_value.to(value.dtype).view(B, K, T, D),
    )


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return flash.rows_first(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.compiled, ctx.tiles = inputs
    ctx.save_for_backward(query, key, value, *output, mask)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    found: tuple[Tensor, Tensor, Tensor] = _backward(
        grad, *ctx.saved_tensors, ctx.compiled, ctx.tiles
    )
    return *found, None, None, None


causal_attention.register_autograd(_gradients, setup_context=_keep)
