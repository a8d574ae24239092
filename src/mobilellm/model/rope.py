"""Rotary position embedding (arXiv 2104.09864) and the ways of stretching it over a longer context.

The rotated pairs are (i, i + head_dim / 2), as in the Hugging Face Llama family. Scaled kinds
follow transformers' `rope_scaling` keys: `linear` (arXiv 2306.15595) and `llama3` (the Llama 3.1
model card). `dynamic`, `yarn` and `longrope` are refused: their angles or attention temperature are
not fixed by the position alone here."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobilellm.budget import ask
from mobilellm.errors import UserError, unknown_name
from mobilellm.model.config import ModelConfig, rope_kind

TABLE_BYTES = 16 << 20
"""Of the tables that a network has from the start; those of a longer context grow with its use."""

KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians a position for each rotated pair, (head_dim / 2,), in float32.

    `UserError` for a kind of scaling that is unknown, or that lacks one of its settings.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling: dict[str, Any] = config.rope_scaling or {}
    kind = rope_kind(scaling)
    if not isinstance(kind, str) or kind not in KEYS:
        raise unknown_name("rope_scaling type", str(kind)[:60], KEYS)
    for key in KEYS[kind]:
        value = scaling.get(key)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(
                f"rope_scaling of type {kind}: {key} = {value!r}, a positive number is needed"
            )
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if high <= low:
            raise UserError(
                f"rope_scaling of type llama3: high_freq_factor {high} is not above "
                f"low_freq_factor {low}"
            )
        turns = (
            scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        )  # over the old context
        # Slow pairs are stretched by the whole factor, fast ones not at all, those between in
        # proportion.
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies


def cos_sin(config: ModelConfig, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the first `length` positions, each (length, head_dim / 2), in float32.

    Without `length` they are those of every position, max_position_embeddings of them. `UserError`
    where the tables take more memory than there is.
    """
    length = length or config.max_position_embeddings
    ask(4 * config.head_dim * length, f"rotary tables of {length:,} positions")
    positions = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos(), angles.sin()


def first_positions(config: ModelConfig) -> int:
    """How many positions a network's tables hold from the start: all of them, unless that takes
    more than TABLE_BYTES (65,536 positions of heads 64 wide)."""
    return max(1, min(config.max_position_embeddings, TABLE_BYTES // (4 * config.head_dim)))
