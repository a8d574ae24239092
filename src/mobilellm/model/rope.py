"""Rotary position embedding (arXiv 2104.09864) and the ways of stretching it over a longer context.

The rotated pairs are (i, i + head_dim / 2), as in the Hugging Face Llama family. Scaled kinds
follow transformers' `rope_scaling` keys: `linear` (arXiv 2306.15595) and `llama3` (the Llama 3.1
model card). `dynamic`, `yarn` and `longrope` are refused: their angles or attention temperature are
not fixed by the position alone here."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobilellm.errors import UserError, unknown_name
from mobilellm.model.config import ModelConfig

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
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KEYS:
        raise unknown_name("rope_scaling type", str(kind), KEYS)
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

    Without `length` they are those of every position, max_position_embeddings of them.
    """
    positions = torch.arange(length or config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config))
    return angles.cos(), angles.sin()
