"""Attention that stays within a document, for samples that hold several.

On a GPU the mask is FlexAttention's block mask (arXiv 2412.05496): blocks without a common document
are never computed. Elsewhere it is a table of booleans for scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.attention import causal_attention

# Positions start to end that see each other as the mask (T, T) says, causally without one; and
# nothing else.
Span = tuple[int, int, Tensor | None]
# A bool Tensor that broadcasts to (B, H, T, S), a flex_attention BlockMask, or a sequence of Spans.
DocumentMask = Any


def document_mask(documents: Tensor, flex: bool | None = None) -> DocumentMask:
    """What token t may attend to: s <= t of the same document. documents (B, T), whole numbers.

    `flex` chooses the block mask; by default it is used on a GPU.
    """
    B, T = documents.shape
    if documents.is_cuda if flex is None else flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (documents[b, query] == documents[b, key]) & (query >= key)

        return create_block_mask(allowed, B, None, T, T, device=str(documents.device))
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return (same & torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()).unsqueeze(1)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None, causal: bool
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value where the mask allows: (B, H, T, D), with keys and
    values (B, K, S, D)."""
    if (
        causal
        and query.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
    ):
        dtype = torch.get_autocast_dtype("cpu")
        return causal_attention(query.to(dtype), key.to(dtype), value.to(dtype))[0]
    grouped = query.shape[1] != key.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    if isinstance(mask, (list, tuple)):
        pieces = [
            F.scaled_dot_product_attention(
                query[:, :, a:b],
                key[:, :, a:b],
                value[:, :, a:b],
                attn_mask=seen,
                is_causal=seen is None,
                enable_gqa=grouped,
            )
            for a, b, seen in mask
        ]
        return torch.cat(pieces, dim=2)
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled block this becomes one fused kernel; outside it is computed in full.
    attended: Tensor = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)
    return attended
