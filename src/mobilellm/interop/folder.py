"""A checkpoint's folder: a Hugging Face folder with our own origin file beside it.

    save_checkpoint(folder, network, tokenizer, {"made_by": "a test"})
    read_origin(folder)      # {"made_by": "a test"}

The files are config.json, model.safetensors, generation_config.json, mobilellm.json and those of
the tokenizer. A plain network loads in transformers as it stands. Training needs no more of this
room than this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mobilellm.files import read_json, write_json
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import to_named, write_tensors
from mobilellm.tokenizer.tokenizer import Tokenizer


def save_checkpoint(
    folder: Path, network: Network, tokenizer: Tokenizer | None, origin: dict[str, Any]
) -> None:
    """Write a network's checkpoint into an existing folder."""
    named = to_named(network.config, dict(network.named_parameters()))
    write_checkpoint(folder, network.config, named, tokenizer, origin)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    named: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    origin: dict[str, Any],
) -> None:
    """Write a checkpoint from tensors under their names on disk into an existing folder."""
    write_json(folder / "config.json", config.to_dict())
    write_tensors(folder / "model.safetensors", named)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(
        folder / "generation_config.json",
        {key: value for key, value in generation.items() if value is not None},
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "mobilellm.json", origin)


def read_origin(folder: Path) -> dict[str, Any]:
    """What mobilellm.json says, or an empty table where there is none."""
    if not (folder / "mobilellm.json").is_file():
        return {}
    origin = read_json(folder / "mobilellm.json", limit=1 << 20)
    return origin if isinstance(origin, dict) else {}
