"""GGUF in: files of the architectures llama and qwen3, of any type that the gguf package can
unpack, in float32.

network, origin = read(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm.budget import ask
from mobilellm.errors import UserError, located
from mobilellm.families.names import gguf_name, reordered
from mobilellm.gguf.header import GGUFHeader, TensorInfo, read_header
from mobilellm.gguf.tokenizer_keys import read_keys
from mobilellm.interop.gguf_format import (
    ARCHITECTURES,
    ROPE_FACTORS,
    SCALING_KEY,
    gguf_package,
    rope_factors,
)
from mobilellm.interop.loaded import Loaded, Reader
from mobilellm.interop.sampling_defaults import from_keys
from mobilellm.model.config import ModelConfig, one_or_several
from mobilellm.model.weights import listed, shapes
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.weights.assemble import assemble, check_weights

# Published settings of Llama 3.1 and 3.2, but for the factor.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def recognizes(path: Path) -> bool:
    """Whether a file begins with GGUF's magic."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def header_of(path: Path) -> GGUFHeader:
    """Keys and tensors of a file. `UserError` for what is not whole."""
    sizes = gguf_package().GGML_QUANT_SIZES
    return read_header(path, {int(kind): size for kind, size in sizes.items()})


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer in the file, or None. `UserError` for kinds whose ids could not be equalled."""
    return read_keys(header_of(path).keys, path)


def read_settings(path: Path) -> dict[str, Any]:
    """How the file's makers sample from it, in generation_config.json's keys."""
    return from_keys(header_of(path).keys)


def describe(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and origin, from the header alone."""
    header = header_of(path)
    return read_config(header, path), _origin(header, path)


def _origin(header: GGUFHeader, path: Path) -> dict[str, Any]:
    kinds = gguf_package().GGMLQuantizationType
    types: dict[str, int] = {}
    for name, info in header.tensors.items():
        if name != ROPE_FACTORS:
            kind = kinds(info.type).name
            types[kind] = types.get(kind, 0) + 1
    return {"file": path.name, "name": header.keys.get("general.name"), "tensor_types": types}


def read(path: Path, *_: object) -> Loaded:
    """The model. `UserError` for other architectures and for what is not whole.

    A reader's other arguments are not looked at: GGUF's llama has no shared layers, and its keys
    that are not known are not read.
    """
    header = header_of(path)
    config = read_config(header, path)
    expected = shapes(config)
    names = {gguf_name(name): name for name in expected}
    unexpected = sorted(header.tensors.keys() - names.keys() - {ROPE_FACTORS})
    missing = sorted(names.keys() - header.tensors.keys())
    if missing or unexpected:
        parts = [f"missing {listed(missing)}"] * bool(missing)
        parts += [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        raise UserError(f"{path}: {'; '.join(parts)}")
    for theirs, ours in names.items():
        if header.tensors[theirs].shape != expected[ours]:
            raise UserError(
                f"{path}: {theirs} is {header.tensors[theirs].shape}, "
                f"its keys ask for {expected[ours]}"
            )
    # They are held in float32 beside the network that they are copied into.
    ask(4 * sum(map(math.prod, expected.values())), f"{path}: its weights in float32")
    named: dict[str, Tensor] = {}
    for theirs, ours in names.items():
        tensor = torch.from_numpy(_unpack(path, header.tensors[theirs]))
        named[ours] = tensor if config.qk_norm else reordered(config, ours, tensor, to="halves")
    check_weights(named, str(path))
    if ROPE_FACTORS in header.tensors:
        found = _unpack(path, header.tensors[ROPE_FACTORS])
        factors = rope_factors(config)
        if factors is None or not np.allclose(found, factors.numpy(), rtol=1e-5):
            raise UserError(
                f"{path}: its own rotary frequencies ({ROPE_FACTORS}) are not supported",
                hint="use the Hugging Face folder",
            )
    return Loaded(
        network=assemble(config, named, str(path)),
        tokenizer=None,
        origin=_origin(header, path),
        generation=from_keys(header.keys),
    )


def _unpack(path: Path, info: TensorInfo) -> np.ndarray:
    """One tensor in float32."""
    gguf = gguf_package()
    kind = gguf.GGMLQuantizationType(info.type)
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
    with located(path):
        return _config(header)


def _config(header: GGUFHeader) -> ModelConfig:
    keys = header.keys
    architecture = keys.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"architecture {architecture!r}; {' and '.join(ARCHITECTURES)} are supported"
        )

    def get(name: str, default: Any = None) -> Any:
        value = keys.get(f"{architecture}.{name}", default)
        if value is None:
            raise UserError(f"the key {architecture}.{name} is missing")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UserError(
                f"{architecture}.{name} is {str(value)[:60]!r}; "
                "one number for all layers is supported"
            )
        return value

    if get("expert_count", 0):
        raise UserError("a mixture of experts is not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError("no token_embd.weight, or not a matrix")
    heads = get("attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f"{architecture}.attention.head_count is {heads!r}")
    head_dim = get("attention.key_length", get("embedding_length") // heads)
    if (
        get("rope.dimension_count", head_dim) != head_dim
        or get("attention.value_length", head_dim) != head_dim
    ):
        raise UserError("rotary positions over a part of each head are not supported")
    return ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_scaling(header, architecture),
        qk_norm=architecture == "qwen3",
        rms_norm_eps=round(float(get("attention.layer_norm_rms_epsilon")), 12),
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=keys.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=one_or_several(end_tokens(keys, embedding.shape[0])),
    )


def end_tokens(keys: dict[str, Any], rows: int) -> list[int]:
    """The tokens that end a text or a turn, as a file with a vocabulary of `rows` names them."""
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [keys.get(f"tokenizer.ggml.{name}") for name in names]
    others = [token for token in found[1:] if isinstance(token, int) and 0 <= token < rows]
    # Of whatever type: ModelConfig says what is wrong.
    first = [] if found[0] is None else [found[0]]
    return [*first, *(token for token in dict.fromkeys(others) if token not in first)]


def _scaling(header: GGUFHeader, architecture: str) -> dict[str, Any] | None:
    """Rotary scaling in transformers' keys, from what llama.cpp reads of it.

    A factor without a type is linear there, and files of 2023 spell the factor `scale_linear`
    (llama.cpp, llama-model.cpp). Llama 3's is a tensor of factors, whose settings are not in the
    file unless it is ours.
    """
    keys = header.keys
    kind = keys.get(f"{architecture}.rope.scaling.type", "linear")
    old = keys.get(f"{architecture}.rope.scale_linear", 0.0)
    factor = keys.get(f"{architecture}.rope.scaling.factor", old) or 1.0
    if kind not in ("none", "linear"):
        raise UserError(f"rope scaling of type {str(kind)[:60]!r} is not supported")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        raise UserError(f"a rope scaling factor of {str(factor)[:60]!r}")
    linear = kind == "linear" and factor != 1.0
    if ROPE_FACTORS not in header.tensors:
        return {"rope_type": "linear", "factor": float(factor)} if linear else None
    if linear:
        raise UserError("linear rope scaling together with frequencies of its own is not supported")
    own = _own_scaling(keys.get(SCALING_KEY))
    narrow = header.tensors["token_embd.weight"].shape[1] <= 3072  # Llama 3.2 1B and 3B
    return own or LLAMA3_SCALING | {"factor": 32.0 if narrow else 8.0}


def _own_scaling(value: Any) -> dict[str, Any] | None:
    """The settings that our own writer says beside the factors; `read` compares the two."""
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


READER = Reader(
    name="gguf",
    what="a .gguf file",
    recognizes=recognizes,
    read=read,
    read_tokenizer=read_tokenizer,
    describe=describe,
    read_settings=read_settings,
)
