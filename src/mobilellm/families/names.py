"""What a Llama's tensors are called in each format, and how the rows of Q and K are ordered there.

    gguf_name("model.layers.3.mlp.up_proj.weight")      # "blk.3.ffn_up.weight"
    swap_pairs(weight, heads=8, to="neighbors")

Rotary positions turn pairs of numbers. In transformers and here, a pair's second number lies half a
head after its first; in the original Llama, and so in llama2.c and in GGUF's llama, it is the next
one. The rows of the Q and K projections change places accordingly. GGUF's qwen3, which is the
network with QK-norm, has them as they are here.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mobilellm.model.config import ModelConfig

# For each tensor its name in Hugging Face folders, in GGUF (ggml's docs/gguf.md), and in llama2.c
# (the fields of TransformerWeights in run.c).
BLOCK = (
    ("input_layernorm",          "attn_norm",   "rms_att_weight"),
    ("self_attn.q_proj",         "attn_q",      "wq"),
    ("self_attn.k_proj",         "attn_k",      "wk"),
    ("self_attn.v_proj",         "attn_v",      "wv"),
    ("self_attn.o_proj",         "attn_output", "wo"),
    ("post_attention_layernorm", "ffn_norm",    "rms_ffn_weight"),
    ("mlp.gate_proj",            "ffn_gate",    "w1"),
    ("mlp.down_proj",            "ffn_down",    "w2"),
    ("mlp.up_proj",              "ffn_up",      "w3"),
)  # fmt: skip
OUTSIDE = (
    ("model.embed_tokens", "token_embd",  "token_embedding_table"),
    ("model.norm",         "output_norm", "rms_final_weight"),
    ("lm_head",            "output",      "wcls"),
)  # fmt: skip
GGUF_BLOCK = {hf: gguf for hf, gguf, _ in BLOCK} | {  # the norms are Qwen3's alone
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
GGUF_OUTSIDE = {hf: gguf for hf, gguf, _ in OUTSIDE}
LLAMA2C_BLOCK = {llama2c: hf for hf, _, llama2c in BLOCK}
LLAMA2C_OUTSIDE = {llama2c: hf for hf, _, llama2c in OUTSIDE}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that is called `name` in Hugging Face folders."""
    stem = name.removesuffix(".weight")
    if stem in GGUF_OUTSIDE:
        return f"{GGUF_OUTSIDE[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_BLOCK[rest]}.weight"


def swap_pairs(weight: Tensor, heads: int, to: Literal["neighbors", "halves"]) -> Tensor:
    """Reorder the rows of a Q or K projection (heads * D, C) so that pairs lie as `to` says."""
    rows, columns = weight.shape
    half = rows // heads // 2
    shape = (heads, 2, half, columns) if to == "neighbors" else (heads, half, 2, columns)
    return weight.view(shape).transpose(1, 2).reshape(rows, columns)


def reordered(
    config: ModelConfig, name: str, weight: Tensor, to: Literal["neighbors", "halves"]
) -> Tensor:
    """A tensor of this Hugging Face name with its pairs as `to` says; only Q and K have any."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.split(".")[-2]
    return swap_pairs(weight, heads[projection], to) if projection in heads else weight
