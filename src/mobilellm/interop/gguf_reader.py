"""GGUF in: any Llama-architecture file, of any type that the gguf package can unpack, in float32.

loaded = load(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.interop.checkpoint import Loaded
from mobilellm.interop.gguf_header import GGUFHeader, TensorInfo, read_header
from mobilellm.interop.gguf_names import (
    ROPE_FACTORS,
    SCALING_KEY,
    gguf_package,
    permuted,
    rope_factors,
    tensor_name,
)
from mobilellm.interop.huggingface import build, check_weights
from mobilellm.interop.tokenizer_parts import ByteLevelParts, byte_level_tokenizer
from mobilellm.model.config import ModelConfig
from mobilellm.model.weights import shapes
from mobilellm.tokenizer.sentencepiece import BPE_MODEL, SentencePieceModel, to_fast_tokenizer
from mobilellm.tokenizer.tokenizer import Tokenizer

PRE_TOKENIZERS = {"gpt-2": False, "gpt2": False, "smollm": True}  # -> whether digits stand alone
UNUSED = 5


def load(path: Path) -> Loaded:
    """Read network and tokenizer. `UserError` for other architectures and for what is not whole."""
    gguf = gguf_package()
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    header = read_header(path, sizes)
    config = read_config(header, path)
    expected = shapes(config)
    names = {tensor_name(name): name for name in expected}
    unexpected = sorted(header.tensors.keys() - names.keys() - {ROPE_FACTORS})
    missing = sorted(names.keys() - header.tensors.keys())
    if missing or unexpected:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [
            f"unexpected {', '.join(unexpected)}"
        ] * bool(unexpected)
        raise UserError(f"{path}: {'; '.join(parts)}")
    for theirs, ours in names.items():
        if header.tensors[theirs].shape != expected[ours]:
            raise UserError(
                f"{path}: {theirs} is {header.tensors[theirs].shape}, its keys ask for {expected[ours]}"
            )
    named: dict[str, Tensor] = {}
    types: dict[str, int] = {}
    for theirs, ours in names.items():
        info = header.tensors[theirs]
        kind = gguf.GGMLQuantizationType(info.type)
        types[kind.name] = types.get(kind.name, 0) + 1
        named[ours] = permuted(
            config, ours, torch.from_numpy(_unpack(gguf, path, info, kind)), to_gguf=False
        )
    check_weights(named, str(path))
    if ROPE_FACTORS in header.tensors:
        found = _unpack(
            gguf,
            path,
            header.tensors[ROPE_FACTORS],
            gguf.GGMLQuantizationType(header.tensors[ROPE_FACTORS].type),
        )
        ours_factors = rope_factors(config)
        if ours_factors is None or not np.allclose(found, ours_factors.numpy(), rtol=1e-5):
            raise UserError(
                f"{path}: its own rotary frequencies ({ROPE_FACTORS}) are not supported",
                hint="use the Hugging Face folder",
            )
    origin = {"file": path.name, "name": header.keys.get("general.name"), "tensor_types": types}
    return Loaded(
        network=build(config, named, str(path)),
        tokenizer=_tokenizer(header.keys, path),
        origin=origin,
    )


def _unpack(gguf: Any, path: Path, info: TensorInfo, kind: Any) -> np.ndarray:
    """One tensor in float32."""
    raw = np.fromfile(path, dtype=np.uint8, count=info.size, offset=info.offset)
    rows = raw.reshape(*info.shape[:-1], -1)
    if kind.name in ("F32", "F16"):
        return rows.view(np.float32 if kind.name == "F32" else np.float16).astype(np.float32)
    try:
        return np.ascontiguousarray(gguf.quants.dequantize(rows, kind), dtype=np.float32)
    except NotImplementedError:
        raise UserError(
            f"{path}: tensors of type {kind.name} cannot be unpacked",
            hint="use another quantization of the model",
        ) from None


def read_config(header: GGUFHeader, path: Path) -> ModelConfig:
    """The configuration that the keys describe."""
    keys = header.keys
    architecture = keys.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r}; llama is supported")

    def get(name: str, default: Any = None) -> Any:
        value = keys.get(f"llama.{name}", default)
        if value is None:
            raise UserError(f"{path}: the key llama.{name} is missing")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UserError(
                f"{path}: llama.{name} is {str(value)[:60]!r}; one number for all layers is supported"
            )
        return value

    if get("expert_count", 0):
        raise UserError(f"{path}: a mixture of experts is not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: no token_embd.weight, or not a matrix")
    heads = get("attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{path}: llama.attention.head_count is {heads!r}")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if (
        get("rope.dimension_count", head_dim) != head_dim
        or get("attention.value_length", head_dim) != head_dim
    ):
        raise UserError(f"{path}: rotary positions over a part of each head are not supported")
    scaling: dict[str, Any] | None = None
    kind = keys.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif kind != "none":
        raise UserError(f"{path}: rope scaling of type {kind!r} is not supported")
    elif (
        ROPE_FACTORS in header.tensors
    ):  # Llama 3 writes its factors alone; these are its published settings
        published = {"rope_type": "llama3", "factor": 32.0 if embedding.shape[1] <= 3072 else 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        scaling = _own_scaling(keys.get(SCALING_KEY)) or published
    try:
        return ModelConfig(
            vocab_size=embedding.shape[0], hidden_size=get("embedding_length"), intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"), num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads), head_dim=head_dim,
            max_position_embeddings=get("context_length"), rope_theta=float(get("rope.freq_base", 10000.0)), rope_scaling=scaling,
            rms_norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),
            tie_word_embeddings="output.weight" not in header.tensors,
            bos_token_id=keys.get("tokenizer.ggml.bos_token_id"), eos_token_id=keys.get("tokenizer.ggml.eos_token_id"),
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error.what}", hint=error.hint) from None


def _own_scaling(value: Any) -> dict[str, Any] | None:
    """The scaling as our own writer says it, beside the factors that every reader uses (and `load` compares)."""
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _tokenizer(keys: dict[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer in the file, or none when it has none. `UserError` for kinds whose ids could not be equalled."""
    kind = keys.get("tokenizer.ggml.model")
    pieces, types = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
    if kind is None or kind == "no_vocab":
        return None
    if not isinstance(pieces, list) or not all(isinstance(p, str) for p in pieces) or not pieces:
        raise UserError(f"{path}: its tokenizer has no list of tokens")
    types = types if isinstance(types, list) and len(types) == len(pieces) else [1] * len(pieces)
    while (
        types and types[-1] == UNUSED and pieces[-1].startswith("[PAD")
    ):  # rows of the embedding that no token has
        pieces, types = pieces[:-1], types[:-1]
    ids = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    if any(
        i is not None and (not isinstance(i, int) or not 0 <= i < len(pieces)) for i in ids.values()
    ):
        raise UserError(
            f"{path}: a special token of its tokenizer is not among its {len(pieces)} tokens"
        )
    template = keys.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    name = str(keys.get("general.name", path.stem))
    if kind == "llama":
        scores = keys.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) < len(pieces):
            raise UserError(f"{path}: its tokenizer has no scores for its {len(pieces)} tokens")
        unknown = keys.get("tokenizer.ggml.unknown_token_id", 0)
        model = SentencePieceModel(
            pieces=pieces, scores=scores[: len(pieces)], types=types, model_type=BPE_MODEL, byte_fallback=True,
            remove_extra_whitespaces=False, add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
            unk_id=unknown if isinstance(unknown, int) and unknown < len(pieces) else 0,
            bos_id=ids["bos"] if keys.get("tokenizer.ggml.add_bos_token", True) else None, eos_id=ids["eos"],
        )  # fmt: skip
        if len(set(pieces)) != len(pieces):
            raise UserError(f"{path}: a piece of its tokenizer occurs twice")
        return Tokenizer(
            to_fast_tokenizer(model, str(path)),
            name=name,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            chat_template=template,
        )
    pre = keys.get("tokenizer.ggml.pre", "gpt-2")
    merges = keys.get("tokenizer.ggml.merges")
    if (
        kind != "gpt2"
        or pre not in PRE_TOKENIZERS
        or not isinstance(merges, list)
        or not all(isinstance(m, str) for m in merges)
    ):
        raise UserError(
            f"{path}: a tokenizer of kind {str(kind)[:40]!r}, {str(pre)[:40]!r}, which cannot be rebuilt exactly",
            hint="give the model's own with --tokenizer",
        )
    parts = ByteLevelParts(
        pieces=pieces, types=types, merges=merges, digits_alone=PRE_TOKENIZERS[pre]
    )
    return byte_level_tokenizer(
        parts, name=name, bos_id=ids["bos"], eos_id=ids["eos"], add_bos=bool(keys.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=template,
    )  # fmt: skip
