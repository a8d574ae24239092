"""What GGUF's reader and writer share: the package, the number types, and rotary scaling.

gguf = gguf_package()
factors = rope_factors(config)       # None unless the rotary frequencies are scaled as Llama 3's
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig, rope_kind
from mobilellm.model.rope import inverse_frequencies

ROPE_FACTORS = "rope_freqs.weight"
SCALING_KEY = "mobilellm.rope_scaling"  # ours: the settings those factors come from, as JSON
# What GGUF calls the network: qwen3 is the one whose queries and keys are normalized.
ARCHITECTURES = ("llama", "qwen3")


def architecture(config: ModelConfig) -> str:
    """One of ARCHITECTURES."""
    return "qwen3" if config.qk_norm else "llama"


def gguf_package() -> ModuleType:
    """The `gguf` package. `UserError` that names the extra when it is not there."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF needs the gguf package", hint="pip install 'mobilellm[gguf]' (1 MB)"
        ) from None
    return gguf


def rope_factors(config: ModelConfig) -> Tensor | None:
    """By how much each rotary frequency is divided, (D/2,): GGUF's form of Llama 3's scaling.

    None when the frequencies are not scaled that way.
    """
    if rope_kind(config.rope_scaling or {}) != "llama3":
        return None
    plain = inverse_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / inverse_frequencies(config)).to(torch.float32)
