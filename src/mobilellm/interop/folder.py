"""A checkpoint's folder: a Hugging Face folder with our own origin file beside it.

    save_checkpoint(folder, network, tokenizer, {"made_by": "a test"})
    read_origin(folder)      # {"made_by": "a test"}

The files are config.json, model.safetensors, generation_config.json, mobilellm.json, a card
(README.md) and those of the tokenizer. A plain network loads in transformers as it stands. Training
needs no more of this room than this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilellm.cards.model_card import FILE as CARD
from mobilellm.cards.model_card import CardFacts, model_card
from mobilellm.files import read_json, write_file, write_json
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import to_named, write_tensors
from mobilellm.tokenizer.tokenizer import Tokenizer

NUMBER_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD_BYTES = 5_000_000_000  # of one file of weights, as transformers divides them


def save_checkpoint(
    folder: Path,
    network: Network,
    tokenizer: Tokenizer | None,
    origin: dict[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    number_type: str = "F32",
    card: CardFacts | None = None,
) -> None:
    """Write a network's checkpoint into an existing folder. Arguments as of `write_checkpoint`."""
    named = to_named(network.config, dict(network.named_parameters()))
    write_checkpoint(
        folder,
        network.config,
        named,
        tokenizer,
        origin,
        generation=generation,
        number_type=number_type,
        card=card,
    )


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    named: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    origin: dict[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    number_type: str = "F32",
    card: CardFacts | None = None,
) -> None:
    """Write a checkpoint from tensors under their names on disk into an existing folder.

    `generation` is how to sample from it, in generation_config.json's keys; `number_type` one of
    NUMBER_TYPES. Weights of more than SHARD_BYTES are divided into several files. `card` is what
    README.md says beside what these arguments do.
    """
    dtype = NUMBER_TYPES[number_type]
    settings = {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config.to_dict() | settings)
    _write_weights(folder, named, dtype)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(
        folder / "generation_config.json",
        dict(generation or {}) | {key: value for key, value in ids.items() if value is not None},
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "mobilellm.json", origin)
    facts = card or CardFacts(name=str(origin.get("run", "")))
    write_file(folder / CARD, model_card(config, origin, facts).encode())


def _write_weights(folder: Path, named: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """One file, or shards with the index that transformers reads."""
    shards: list[dict[str, Tensor]] = [{}]
    held = total = 0
    for name, tensor in named.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += size
        total += size
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, 1 + len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: tensor.to(dtype) for name, tensor in shard.items()})
    if len(shards) > 1:
        places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def stored_type(network: Network) -> str:
    """The smallest of NUMBER_TYPES that holds every parameter exactly."""
    for name in ("BF16", "F16"):
        dtype = NUMBER_TYPES[name]
        if all(torch.equal(p, p.to(dtype).to(p.dtype)) for p in network.parameters()):
            return name
    return "F32"


def read_origin(folder: Path) -> dict[str, Any]:
    """What mobilellm.json says, or an empty table where there is none."""
    if not (folder / "mobilellm.json").is_file():
        return {}
    origin = read_json(folder / "mobilellm.json", limit=1 << 20)
    return origin if isinstance(origin, dict) else {}
