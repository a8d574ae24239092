"""GGUF out: the file llama.cpp and its many users read.

    notes = save(Path("m.gguf"), model)         # a ModelToWrite: network, tokenizer, "Q8_0"

Number types are F32, F16, BF16, Q8_0 and Q4_0, whose blocks of 32 fit every MobileLLM width
(K-quants need rows of 256, which 576, 960, 1152 and 1600 are not). Tensors are packed and written
one at a time. Norms stay in F32, and a tied output layer is left out. With a type of four bits the
embedding and an untied output layer are Q8_0: that takes SmolLM2-135M from a perplexity of 39.5 to
35.6 (28.4 in float) for 14 MB more (docs/log.md).

Of a quantized model Q4_0 and Q8_0 are written from its own integers and scales, so that the file
holds the very numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.families.names import gguf_name, reordered
from mobilellm.gguf.tokenizer_keys import add_keys
from mobilellm.interop.gguf_blocks import q4_0, q8_0
from mobilellm.interop.gguf_format import (
    ROPE_FACTORS,
    SCALING_KEY,
    architecture,
    gguf_package,
    rope_factors,
)
from mobilellm.interop.sampling_defaults import add_keys as add_sampling_keys
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.config import ModelConfig, rope_kind
from mobilellm.model.weights import stacks, to_named
from mobilellm.quantize.grid import GROUP, GridWeight
from mobilellm.quantize.quantized import Quantized

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
VOCABULARY_TYPES = {"Q4_0": "Q8_0"}  # of the vocabulary's matrices, where not that of the others
BLOCKS = {"Q4_0": q4_0, "Q8_0": q8_0}  # number types that hold the grid's integers


def save(path: Path, model: ModelToWrite) -> list[str]:
    """Write a plain network with its matrices in the number type asked for.

    Returns a line for each thing that is not as asked. `UserError` for what GGUF cannot say.
    """
    network, tokenizer, number_type = model.network, model.tokenizer, model.number_type
    gguf = gguf_package()
    config = network.config
    if config.layer_repeats > 1:
        raise UserError("GGUF's llama has no shared layers", hint="unroll them first")
    if config.windows_within(config.max_position_embeddings):
        raise UserError(
            f"GGUF's {architecture(config)} has no sliding windows by layer (layer_types)",
            hint="convert --to hf",
        )
    if number_type == "Q4_0" and model.quantized is not None and model.quantized.kind.bits != 4:
        raise UserError(
            f"Q4_0: the model is quantized to {model.quantized.kind.bits} bits already",
            hint="write Q8_0, or quantize the original with --scheme int4",
        )
    if config.qk_norm and rope_factors(config) is not None:
        raise UserError(
            "GGUF's qwen3, the network with qk_norm, has no rotary scaling as Llama 3's",
            hint="convert --to hf",
        )
    writer = gguf.GGUFWriter(path, architecture(config))
    writer.add_name(str(model.origin.get("name", path.stem)))
    writer.add_description("made by mobilellm")
    if model.card is not None and model.card.license is not None:
        writer.add_license(model.card.license)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(
        getattr(gguf.LlamaFileType, f"{'ALL' if number_type == 'F32' else 'MOSTLY'}_{number_type}")
    )
    scaling = config.rope_scaling or {}
    if rope_kind(scaling) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    notes = [] if tokenizer is None else add_keys(writer, tokenizer, config)
    notes += add_sampling_keys(writer, model.generation)

    named = to_named(config, dict(network.named_parameters()))
    grids = {} if model.quantized is None else _grids(config, model.quantized)
    kinds: dict[str, str] = {}
    for name, tensor in named.items():
        kinds[name], note = _kind(name, tensor, grids, model)
        notes += note
        kind = getattr(gguf.GGMLQuantizationType, kinds[name])
        size = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        shape = size if kinds[name].startswith(("Q", "BF")) else tuple(tensor.shape)
        dtype = {"F32": "float32", "F16": "float16"}.get(kinds[name], "uint8")
        nbytes = int(np.prod(size))
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(dtype), nbytes, raw_dtype=kind)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_string(SCALING_KEY, json.dumps(config.rope_scaling))
        values = factors.numpy()
        writer.add_tensor_info(ROPE_FACTORS, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in named.items():
        weight = grids.get(name)
        if weight is not None and kinds[name] in BLOCKS:
            writer.write_tensor_data(BLOCKS[kinds[name]](_reordered(config, name, weight)))
            continue
        matrix = tensor.cpu().float()
        if not config.qk_norm:
            matrix = reordered(config, name, matrix, to="neighbors")
        array = matrix.contiguous().numpy()
        kind = getattr(gguf.GGMLQuantizationType, kinds[name])
        writer.write_tensor_data(gguf.quants.quantize(array, kind))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    return notes


def _kind(
    name: str, tensor: Tensor, grids: Mapping[str, GridWeight], model: ModelToWrite
) -> tuple[str, list[str]]:
    """The number type of a tensor, and a line where it is not the one asked for."""
    asked, columns = model.number_type, tensor.shape[-1]
    if tensor.ndim == 1:
        return "F32", []
    if name in VOCABULARY:
        asked = VOCABULARY_TYPES.get(asked, asked)
    if asked not in BLOCKS:
        return asked, []
    exact = model.quantized is not None
    if exact and name not in grids:
        kind = "BF16" if torch.equal(tensor, tensor.bfloat16().float()) else "F32"
        return kind, [f"{gguf_name(name)} is {kind}: quantizing left it as it is"]
    if columns % GROUP:
        kind = "F32" if exact else "F16"
        return kind, [
            f"{gguf_name(name)} is {kind}: its rows of {columns} do not divide by {GROUP}"
        ]
    return asked, []


def _grids(config: ModelConfig, quantized: Quantized) -> dict[str, GridWeight]:
    """The matrices on the grid by their names on disk."""
    found: dict[str, GridWeight] = {}
    for ours, parts in stacks(config).items():
        start = 0
        for name, rows in parts:
            if ours in quantized.weights:
                found[name] = quantized.weights[ours].rows(start, start + rows)
            start += rows
    return found


def _reordered(config: ModelConfig, name: str, weight: GridWeight) -> GridWeight:
    """A matrix on the grid with the rows of Q and K as GGUF has them."""
    if config.qk_norm:
        return weight
    return GridWeight(
        integers=reordered(config, name, weight.integers, to="neighbors"),
        scales=reordered(config, name, weight.scales, to="neighbors"),
        bits=weight.bits,
    )
