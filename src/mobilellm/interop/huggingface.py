"""Hugging Face folders in: the Llama family, MobileLLM-R1, our own, and the original MobileLLM's.

    network, origin = read(Path("SmolLM2-135M"))

Weights are single or sharded safetensors, or pytorch_model.bin, which is read with
`weights_only=True`: tensors, never code.

The original's configurations carry `share_embedding` and `layer_sharing`
(facebookresearch/MobileLLM). The tie holds whatever `tie_word_embeddings` says, and a user has to
say which kind of sharing the weights were trained for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mobilellm.budget import ask
from mobilellm.errors import UserError, first_line, located
from mobilellm.families import llama4, paretoq
from mobilellm.files import read_json
from mobilellm.interop.folder import read_origin
from mobilellm.interop.loaded import Loaded, Reader
from mobilellm.interop.pickled import read_pickle
from mobilellm.interop.sampling_defaults import read_settings
from mobilellm.model.config import (
    ALL,
    SLIDING,
    ModelConfig,
    SharedKV,
    one_or_several,
    plausible_layers,
)
from mobilellm.model.rope import inverse_frequencies
from mobilellm.quantize.grid import GridWeight
from mobilellm.quantize.quantized import read as read_quantized
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.weights.assemble import assemble, check_weights
from mobilellm.weights.mapped import MappedTensors, mapped_tensors

MODEL_TYPES = ("llama", "qwen3", "cwm", "mobilellm", llama4.MODEL_TYPE)
# Keys that foreign configurations carry and that do not touch the network.
HARMLESS = frozenset(
    {
        "attn_implementation", "auto_map", "begin_suppress_tokens", "cross_attention_hidden_size",
        "decoder_start_token_id", "do_sample", "finetuning_task", "is_decoder",
        "is_encoder_decoder", "max_length", "max_new_tokens", "mobilellm", "prefix", "sep_token_id",
        "temperature", "tokenizer_class", "top_k", "top_p", "torchscript", "use_bfloat16",
    }
)  # fmt: skip
# Keys that other tools leave behind, which say how a model was made or is used: named to the user.
LEFT_BEHIND = frozenset(
    {
        "_commit_hash", "add_cross_attention", "aiq_version", "bad_words_ids", "base_model",
        "custom_pipelines", "eos_token", "exponential_decay_length_penalty", "id2label",
        "keys_to_ignore_at_inference", "label2id", "max_sequence_length", "min_length",
        "model_max_length", "name_or_path", "no_repeat_ngram_size", "pad_token",
        "repetition_penalty", "task_specific_params", "tokenizer_max_length", "training_args",
        "use_flash_attention", "use_flash_attn", "vocab_file",
    }
)  # fmt: skip
LEFT_BEHIND_BY = ("unsloth_", "trl_", "axolotl_", "peft_", "mergekit_")  # how their keys begin
# What an absent key means to transformers' LlamaConfig, where our default is another.
LLAMA_DEFAULTS = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The same of its CwmConfig, the Llama network with sliding windows.
CWM_DEFAULTS = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "sliding_window": 8192,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
MAX_SHARDS = 4096
MAX_HEADER = 16 << 20  # bytes of a safetensors file's table of contents; 1,000 tensors take 120,000
MAX_CONFIG = 1 << 20  # bytes of config.json


def foreign_keys(values: dict[str, Any]) -> list[str]:
    """The keys of a config.json that other tools left behind and that cannot change the network."""
    found = [key for key in values if key in LEFT_BEHIND or key.startswith(LEFT_BEHIND_BY)]
    kinds = values.get("layer_types")
    windows = values.get("model_type") == "cwm" or values.get("use_sliding_window")
    if not windows and isinstance(kinds, list) and all(kind == ALL for kind in kinds):
        found.append("layer_types")
    return found


def config_values(folder: Path) -> dict[str, Any]:
    """What config.json holds."""
    where = folder / "config.json"
    values = read_json(where, limit=MAX_CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object")
    return values


def read_config(
    folder: Path,
    values: dict[str, Any],
    shared_kv: SharedKV | None,
    ignored: Collection[str] = (),
) -> tuple[ModelConfig, bool]:
    """The configuration that the `values` of config.json are, and whether its kind of layer sharing
    had to be told.

    Keys of `ignored` are left out, and so are those that other tools left behind.
    """
    where = folder / "config.json"
    needless = {*HARMLESS, *foreign_keys(values), *ignored}
    values = {key: value for key, value in values.items() if key not in needless}
    kind = values.get("model_type", "llama")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{where}: model_type {str(kind)[:60]!r} is another kind of network",
            hint=f"supported: {', '.join(MODEL_TYPES)}",
        )
    if kind == llama4.MODEL_TYPE:
        values = llama4.plain_values(values, str(where))
    elif kind == "cwm":
        values = _cwm_values(values)
    elif kind == "llama" and SLIDING in str(values.get("layer_types")):
        raise UserError(
            f"{where}: layer_types has {SLIDING}, which transformers' llama does not do",
            hint="model_type cwm is the Llama network with sliding windows",
        )
    paretoq.bits_of(values, str(where))
    values.pop(paretoq.KEY, None)
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{where}: the weights are quantized (quantization_config)",
            hint="use the unquantized model, or a GGUF",
        )
    values.pop("quantization_config", None)
    share_embedding = values.pop("share_embedding", None)
    if share_embedding:
        values["tie_word_embeddings"] = True
    values = LLAMA_DEFAULTS | values
    sharing, told = values.pop("layer_sharing", None), False
    if sharing and "layer_repeats" not in values:
        if shared_kv is None:
            raise UserError(
                f"{where}: layer_sharing is on, but two different networks go by that name",
                hint="add --shared-kv own or --shared-kv first (what the published training code "
                "trains), or --text FILE to measure both",
            )
        values |= {"layer_repeats": 2, "shared_kv": shared_kv}
        told = True
    elif (
        shared_kv is not None
        and values.get("layer_repeats", 1) != 1
        and values.get("shared_kv") != shared_kv
    ):
        raise UserError(
            f"{where}: says shared_kv = {values.get('shared_kv')!r}, not {shared_kv!r}",
            hint="leave out --shared-kv",
        )
    try:
        config = ModelConfig.from_dict(_end_within(values), str(where))
    except UserError as error:
        if "unknown key" not in error.what:
            raise
        raise UserError(
            error.what,
            hint=f"{error.hint}; where it changes nothing: convert --ignore-keys KEY",
        ) from None
    config = dataclasses.replace(config, eos_token_id=_end_tokens(folder, config))
    with located(where):
        inverse_frequencies(config)
    return config, told


def _cwm_values(values: dict[str, Any]) -> dict[str, Any]:
    """CWM's keys with what the absent ones mean: every fourth layer is full, from the first on."""
    values = CWM_DEFAULTS | values
    layers = values.get("num_hidden_layers")
    if values.get("layer_types") is None and plausible_layers(layers):
        values["layer_types"] = [SLIDING if i % 4 else ALL for i in range(layers)]
    if values.get("rope_parameters") is None and "rope_theta" not in values:
        rope = {"rope_type": "llama3", "factor": 16.0, "original_max_position_embeddings": 8192}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e6}
        values["rope_parameters"] = rope
    return values


def _end_within(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration without end tokens outside the vocabulary, which never come."""
    rows, named = values.get("vocab_size"), values.get("eos_token_id")
    tokens = named if isinstance(named, list) else [named]
    if not isinstance(rows, int) or all(type(one) is not int or one < rows for one in tokens):
        return values
    within = [one for one in tokens if type(one) is not int or one < rows]
    return values | {"eos_token_id": one_or_several(within)}


def _end_tokens(folder: Path, config: ModelConfig) -> int | list[int] | None:
    """The tokens that end a text: those of generation_config.json where it names any.

    transformers looks there first. A token outside the vocabulary never comes, and is left out.
    """
    where = folder / "generation_config.json"
    values = read_json(where, limit=MAX_CONFIG) if where.is_file() else {}
    named = values.get("eos_token_id") if isinstance(values, dict) else None
    if named is None:
        return config.eos_token_id
    tokens = named if isinstance(named, list) else [named]
    if any(type(token) is not int or token < 0 for token in tokens):  # a bool is an int, too
        raise UserError(f"{where}: eos_token_id = {str(named)[:60]}: must be token ids")
    tokens = [token for token in tokens if token < config.vocab_size]
    return one_or_several(tokens) if tokens else config.eos_token_id


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors before pickles, one file before shards."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            listed = read_json(folder / index)
            shards = sorted(set(listed["weight_map"].values())) if _is_index(listed) else []
            if (
                not shards
                or len(shards) > MAX_SHARDS
                or any(Path(name).name != name for name in shards)
            ):
                raise UserError(f"{folder / index}: not an index of shards beside it")
            for name in shards:
                if not (folder / name).is_file():
                    raise UserError(
                        f"{folder / name}: missing, though {index} names it",
                        hint="fetch the whole model again",
                    )
            return [folder / name for name in shards]
    raise UserError(
        f"{folder}: no weights here", hint="model.safetensors or pytorch_model.bin is looked for"
    )


def _is_index(value: Any) -> bool:
    entries = value.get("weight_map") if isinstance(value, dict) else None
    return isinstance(entries, dict) and all(isinstance(name, str) for name in entries.values())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file.

    `UserError` when it is damaged, or a pickle that holds anything but tensors.
    """
    if path.suffix != ".safetensors":
        return read_pickle(path)
    try:
        check_header(path)
        return mapped_tensors(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({first_line(error)})",
            hint="the file is damaged or not what its name says: fetch it again",
        ) from None


def check_header(path: Path) -> None:
    """`UserError` for a safetensors file whose table of contents is longer than MAX_HEADER: the
    library holds it in a form that takes many times the memory."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise UserError(f"{path}: a header of {length} bytes, the limit is {MAX_HEADER}")


def honor_tie(config: ModelConfig, named: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Drop an output layer that repeats the tied embedding, and rotary tables.

    `UserError` when the output layer contradicts the embedding, or there is no embedding.
    """
    named = {
        name: tensor for name, tensor in named.items() if not name.endswith("rotary_emb.inv_freq")
    }
    embedding, head = named.get("model.embed_tokens.weight"), named.get("lm_head.weight")
    if embedding is None:
        raise UserError(
            f"{where}: there is no model.embed_tokens.weight"
            + (", only an lm_head.weight" if head is not None else ""),
            hint="the checkpoint was converted without its embedding: use another conversion",
        )
    if _is_constant(embedding):
        raise UserError(
            f"{where}: model.embed_tokens.weight is constant: it was never initialized",
            hint="use another conversion",
        )
    if config.tie_word_embeddings and head is not None:
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise UserError(
                f"{where}: lm_head.weight differs from the embedding that config.json ties it to",
                hint="one of the two was lost in a conversion: use another one, or set "
                "tie_word_embeddings to false if it is meant",
            )
        named.pop("lm_head.weight")
    return named


def _is_constant(tensor: Tensor) -> bool:
    """Whether all numbers (R, C) are the same one. Few rows are looked at where they are not."""
    rows, first = range(len(tensor)), tensor.flatten()[:1]
    return bool(tensor.numel()) and all(bool((tensor[i] == first).all()) for i in rows)


def spread_mlp(config: ModelConfig, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """MobiLlama's weights with its one feed-forward under the name of every layer.

    safetensors stores tensors that are one in memory once, under one layer's name.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(mlp\..+)", name):
            found.setdefault(match[1], {})[match[2]] = tensor
    if len(found) != 1:
        return named
    (parts,) = found.values()
    return named | {
        f"model.layers.{i}.{part}": tensor
        for i in range(config.num_hidden_layers)
        for part, tensor in parts.items()
    }


def read(
    folder: Path,
    shared_kv: SharedKV | None = None,
    ignored: Collection[str] = (),
    halves: bool = False,
    release: bool = False,
) -> Loaded:
    """The model of a folder; what lies on the grid does so by our own file, or ParetoQ's.
    `UserError` says what is wrong with its files.

    With `halves` matrices that are stored in bf16 stay so (see `assemble`). With `release` the
    parameters of our own file's matrices are given back as they are read.
    """
    values = config_values(folder)
    config, told = read_config(folder, values, shared_kv, ignored)
    stored, where = _all_tensors(folder)
    check_weights(stored, where, stored.let_go)
    named: dict[str, Tensor] = stored
    bits, grids = paretoq.bits_of(values, where), dict[str, GridWeight]()
    if bits is not None:
        named, grids = paretoq.on_grid(named, bits, where)
    named = honor_tie(config, named, where)
    stored.let_go()
    of_llama4 = values.get("model_type") == llama4.MODEL_TYPE
    if of_llama4:
        named = llama4.plain_tensors(config, named)
    if "mobillama" in str(values.get("auto_map")).lower():
        named = spread_mlp(config, named)
    network = assemble(config, named, where, halves=halves, copied=stored.let_go)
    origin = read_origin(folder) or {
        "folder": folder.name,
        "model_type": values.get("model_type"),
    }
    if left_out := sorted({*foreign_keys(values), *(set(ignored) & values.keys())}):
        origin = origin | {"left_out": {key: values[key] for key in left_out}}
    if of_llama4 and llama4.context_cut(values, config):
        origin = origin | {"first_chunk": config.max_position_embeddings}
    if told:
        origin = origin | {"shared_kv_told": shared_kv}
    quantized = read_quantized(folder, network, release)
    if quantized is None and bits is not None:
        quantized = paretoq.quantized_of(config, grids, bits)
    return Loaded(
        network=network,
        tokenizer=None,
        origin=origin,
        quantized=quantized,
        generation=read_settings(folder),
    )


def _all_tensors(folder: Path) -> tuple[MappedTensors, str]:
    """Every tensor of a folder, and what messages call the place."""
    files = weight_files(folder)
    where = str(files[0] if len(files) == 1 else folder)
    ask(sum(file.stat().st_size for file in files), f"{where}: its weights")
    named = MappedTensors({})
    for file in files:
        found = read_tensors(file)
        named.update(found)
        named.maps += found.maps if isinstance(found, MappedTensors) else []
    return named, where


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where it has none. `UserError` when it cannot be read."""
    known = ("tokenizer.json", "tokenizer.model")
    return Tokenizer.load(folder) if any((folder / name).is_file() for name in known) else None


def describe(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and origin, without the weights."""
    values = config_values(folder)
    original = values.get("layer_sharing") and "layer_repeats" not in values
    config, _ = read_config(folder, values, "first" if original else None)
    origin = read_origin(folder)
    if original:
        origin = origin | {
            "layer_sharing": "on, of a kind the configuration does not say (shown as: first)"
        }
    return config, origin


READER = Reader(
    name="hf",
    what="a folder with config.json and weights",
    recognizes=Path.is_dir,
    read=read,
    read_tokenizer=read_tokenizer,
    describe=describe,
    read_settings=read_settings,
)
