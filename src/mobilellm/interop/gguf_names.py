"""What a Llama's tensors and types are called in GGUF, and the package that knows how they are packed."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.interop.llama2c import swap_pairs
from mobilellm.model.config import ModelConfig

BLOCK = {
    "input_layernorm.weight": "attn_norm.weight", "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight", "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight", "mlp.down_proj.weight": "ffn_down.weight",
}  # fmt: skip
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
SCALING_KEY = "mobilellm.rope_scaling"  # ours: the settings behind those factors, as JSON


def gguf_package() -> ModuleType:
    """The `gguf` package. `UserError` that names the extra when it is not there."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF needs the gguf package", hint="pip install 'mobilellm[export]'"
        ) from None
    return gguf


def tensor_name(name: str) -> str:
    """Our name on disk -> GGUF's."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}"


def permuted(config: ModelConfig, name: str, tensor: Tensor, to_gguf: bool) -> Tensor:
    """Q and K rows between our order of rotated pairs and llama.cpp's, where pairs are neighbours; others as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    return tensor if heads is None else swap_pairs(tensor, heads, to_neighbours=to_gguf)


def rope_factors(config: ModelConfig) -> Tensor | None:
    """By how much each rotary frequency is divided, (D/2,): how GGUF says Llama 3's scaling; none when it is not scaled so."""
    from dataclasses import replace

    from mobilellm.model.rope import inverse_frequencies

    if (
        not config.rope_scaling
        or config.rope_scaling.get("rope_type", config.rope_scaling.get("type")) != "llama3"
    ):
        return None
    return (
        inverse_frequencies(replace(config, rope_scaling=None)) / inverse_frequencies(config)
    ).to(torch.float32)
