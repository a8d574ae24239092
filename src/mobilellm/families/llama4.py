"""MobileLLM-R1 and R1.5 in: Llama 4's text network without experts, as the network of Qwen3.

    values = plain_values(values, "config.json")   # keys of llama4_text -> of qwen3 or llama
    named = plain_tensors(config, named)           # names and order of rows of that network

Llama 4 turns neighboring pairs of each query and key and then divides it by its root mean square.
A turn changes no mean square, so dividing first and turning then is the same, and that is QK-norm
without gains: with the rows of both projections in another order and gains of 1, the network is
Qwen3's (`use_qk_norm` false: Llama's). Experts, layers without rotary positions and a temperature
that grows with the position have no equal here, and are refused. Attention in chunks is full
attention up to the first chunk's end, so that the context ends there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.families.names import reordered
from mobilellm.model.config import ModelConfig, plausible_layers

MODEL_TYPE = "llama4_text"
# What an absent key means to transformers' Llama4TextConfig.
DEFAULTS = {
    "intermediate_size_mlp": 16384,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8192,
}
# Settings of experts and of temperatures, which say nothing where there are none of either.
OF_ABSENT_PARTS = (
    "attn_scale",
    "floor_scale",
    "num_experts_per_tok",
    "num_local_experts",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "for_llm_compressor",
    "cache_implementation",
)


def plain_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a llama4_text configuration as those of the plain network that is equal to it.

    `UserError` names experts, layers without rotary positions and temperature tuning.
    """
    found = DEFAULTS | dict(values)
    layers = found.get("num_hidden_layers")
    if not plausible_layers(layers):
        raise UserError(f"{where}: num_hidden_layers = {repr(layers)[:60]}: not a number of layers")
    step, expert_layers = found.pop("interleave_moe_layer_step"), found.pop("moe_layers", None)
    if expert_layers is None:
        expert_layers = range(step - 1, layers, step) if type(step) is int and step > 0 else ()
    if expert_layers:
        raise UserError(
            f"{where}: a mixture of experts (moe_layers) is not supported",
            hint="of Llama 4's kind those without experts are: MobileLLM-R1 and R1.5",
        )
    interval, turned = found.pop("no_rope_layer_interval"), found.pop("no_rope_layers", None)
    if not turned:  # 1 stands for a layer with rotary positions
        every = interval if type(interval) is int and interval > 0 else 1
        turned = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers or not all(turned[:layers]):
        raise UserError(
            f"{where}: layers without rotary positions (no_rope_layers) are not supported"
        )
    if found.pop("attn_temperature_tuning", None):
        raise UserError(
            f"{where}: attn_temperature_tuning: an attention temperature that grows with the "
            "position is not supported"
        )
    kinds, chunk = found.pop("layer_types", None), found.pop("attention_chunk_size")
    if kinds is None:
        kinds = ["chunked_attention"]
    if not isinstance(kinds, list) or not {*kinds} <= {"chunked_attention", "full_attention"}:
        raise UserError(f"{where}: layer_types of llama4_text are chunked or full attention")
    if "chunked_attention" in kinds and chunk is not None:
        if type(chunk) is not int or chunk < 1:
            raise UserError(f"{where}: attention_chunk_size = {chunk!r}: must be a whole number")
        found["max_position_embeddings"] = min(found["max_position_embeddings"], chunk)
    # The width of the experts, which there are none of, goes by the usual name.
    found["intermediate_size"] = found.pop("intermediate_size_mlp")
    if found.pop("use_qk_norm"):
        found |= {"model_type": "qwen3", "qk_norm_gain": False}
    else:
        found["model_type"] = "llama"
    return {key: value for key, value in found.items() if key not in OF_ABSENT_PARTS}


def context_cut(values: Mapping[str, Any], config: ModelConfig) -> bool:
    """Whether the configuration file gives more positions than its first chunk of attention has."""
    given = values.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    return bool(given != config.max_position_embeddings)


def plain_tensors(config: ModelConfig, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a llama4_text under the plain network's names, with rows in its order."""
    found: dict[str, Tensor] = {}
    rows = {
        "q_proj": config.num_attention_heads * config.head_dim,
        "k_proj": config.num_key_value_heads * config.head_dim,
    }
    for name, tensor in named.items():
        name = name.replace(".feed_forward.", ".mlp.")
        of = name.split(".")[-2] if "." in name else ""
        # Tensors of another shape stay as they are, and are named by the check of shapes.
        if of in rows and tensor.ndim == 2 and tensor.shape[0] == rows[of]:
            tensor = reordered(config, name, tensor, to="halves")
        found[name] = tensor
    return found
