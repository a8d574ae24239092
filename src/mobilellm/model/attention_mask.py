"""What tokens may attend to: those before them, within a document, within a sliding window.

On a GPU the mask is FlexAttention's block mask (arXiv 2412.05496): blocks without a common document
are never computed. Elsewhere it is a table of booleans for scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.kernels.attention import causal_attention
from mobilellm.kernels.flash import tiles_are_used
from mobilellm.model.attention_spec import FULL, AttentionSpec


class Span(NamedTuple):
    """Tokens of a packed row that see each other, and earlier ones."""

    start: int
    end: int
    """The place after the last."""
    seen: Tensor | None = None
    """What each of the n tokens sees, bool (n, places in `before` and its own); without one, what
    stands before it here, and `before` is empty."""
    before: tuple[tuple[int, int], ...] = ()
    """Ranges (start, end) of earlier places that they may see."""

    def of(self, x: Tensor, dim: int) -> Tensor:
        """What x holds along `dim` of the places that are seen."""
        own = x.narrow(dim, self.start, self.end - self.start)
        if not self.before:
            return own
        return torch.cat([*(x.narrow(dim, a, b - a) for a, b in self.before), own], dim)


# A bool Tensor that broadcasts to (B, H, T, S), a flex_attention BlockMask, or a sequence of Spans.
DocumentMask = Any


def attention_mask(
    spec: AttentionSpec,
    past: int,
    length: int,
    device: torch.device,
    documents: Tensor | None = None,
    packed: tuple[Tensor, Sequence[Span]] | None = None,
) -> tuple[DocumentMask | None, bool]:
    """The mask of `length` new tokens after `past` cached ones, and whether it is plain causality
    instead, for a layer that looks at what `spec` says. `documents` and `packed` are those of
    `Network.hidden`."""
    if documents is not None:
        return document_mask(documents, spec=spec), False
    if packed is not None and not past:
        positions, spans = packed
        return (spans if spec == FULL else windowed_spans(spec, positions, spans)), False
    if length == 1:  # sees all that the cache gives it
        return None, False
    if spec == FULL and not past:
        return None, True
    # Behind cached positions a query may look at all of them, so causality needs a mask.
    kept = past if spec.window is None else min(past, spec.window - 1)
    keys = torch.arange(past - kept, past + length, device=device)
    return spec.sees(keys[kept:], keys), False


def windowed_spans(spec: AttentionSpec, positions: Tensor, spans: Sequence[Span]) -> list[Span]:
    """Spans of a packed row in which tokens also see no further back than `spec` says."""
    found = []
    for span in spans:
        at, keys = positions[span.start : span.end], span.of(positions, 0)
        near = spec.sees(at, keys)
        if span.seen is not None:
            near &= span.seen
        found.append(span._replace(seen=near))
    return found


def document_mask(
    documents: Tensor, flex: bool | None = None, spec: AttentionSpec = FULL
) -> DocumentMask:
    """What token t may attend to: s <= t of the same document, as far back as `spec` says.
    documents (B, T), whole numbers.

    `flex` chooses the block mask; by default it is used on a GPU.
    """
    B, T = documents.shape
    if documents.is_cuda if flex is None else flex:
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (documents[b, query] == documents[b, key]) & (query >= key)
            return same if spec.window is None else same & (query - key < spec.window)

        return create_block_mask(allowed, B, None, T, T, device=str(documents.device))
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    places = torch.arange(T, device=documents.device)
    return (same & spec.sees(places, places)).unsqueeze(1)


def _within_causality(mask: DocumentMask | None, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is a table that hides what comes later, as those of training are."""
    return isinstance(mask, Tensor) and query.shape[2] == key.shape[2]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask | None, causal: bool
) -> Tensor:
    """softmax(query key^T / sqrt(D)) value where the mask allows: (B, H, T, D), with keys and
    values (B, K, S, D)."""
    compiled, tiles = torch.compiler.is_compiling(), tiles_are_used()
    autocast = torch.is_autocast_enabled("cpu")
    if (
        (causal or ((compiled or tiles) and _within_causality(mask, query, key)))
        and query.device.type == "cpu"
        and torch.is_grad_enabled()
        and (autocast or tiles)
    ):
        dtype = torch.get_autocast_dtype("cpu") if autocast else query.dtype
        allowed = mask.view(-1, 1, *mask.shape[-2:]) if isinstance(mask, Tensor) else None
        return causal_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), allowed, compiled, tiles
        )[0]
    grouped = query.shape[1] != key.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    if isinstance(mask, (list, tuple)):
        pieces = [
            F.scaled_dot_product_attention(
                query[:, :, span.start : span.end],
                span.of(key, 2),
                span.of(value, 2),
                attn_mask=span.seen,
                is_causal=span.seen is None,
                enable_gqa=grouped,
            )
            for span in mask
        ]
        return torch.cat(pieces, dim=2)
    from torch.nn.attention.flex_attention import flex_attention

    # Inside a compiled block this becomes one fused kernel; outside it is computed in full.
    attended: Tensor = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)
    return attended
