"""Checkpoints on disk: what our own look like, and how any readable one is loaded.

    loaded = load(Path("runs/demo"))          # a run, a checkpoint, a Hugging Face folder, ...
    loaded.network, loaded.tokenizer

Ours are Hugging Face folders: config.json, model.safetensors, tokenizer files; plain networks load in transformers as they
stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mobilellm.data.tokenizer import Tokenizer
from mobilellm.errors import UserError
from mobilellm.files import read_json, write_json
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import load_weights, to_named


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model read from disk."""

    network: Network
    tokenizer: Tokenizer | None
    origin: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The network's configuration."""
        return self.network.config

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a prompt: behind BOS where the tokenizer has one; an empty one begins with the end-of-text token."""
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer", mend="put its tokenizer.json or tokenizer.model into the folder")
        opening = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        ids = opening + self.tokenizer.encode(text)
        return ids or ([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id])

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """The text that `tokens` add to the prompt's (decoding both, since pieces can join across the border)."""
        assert self.tokenizer is not None
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(before) :]


def save_checkpoint(folder: Path, network: Network, tokenizer: Tokenizer | None, origin: dict[str, Any]) -> None:
    """Write a checkpoint's files into an existing folder."""
    config = network.config
    write_json(folder / "config.json", config.to_dict())
    named = to_named(config, dict(network.named_parameters()))
    save_file({name: tensor.cpu() for name, tensor in named.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "mobilellm.json", origin)


def locate(path: Path) -> Path:
    """The folder that holds config.json: `path`, or the newest checkpoint of the run there."""
    if (path / "config.json").is_file():
        return path
    steps = sorted((path / "checkpoints").glob("step-????????"))
    if steps:
        return steps[-1]
    raise UserError(f"{path}: no model here", mend="give a run with a checkpoint, or a folder with config.json")


def load(path: Path) -> Loaded:
    """Read network and tokenizer."""
    folder = locate(path)
    network = Network(ModelConfig.read(folder / "config.json"))
    load_weights(network, load_file(folder / "model.safetensors"), str(folder / "model.safetensors"))
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    origin = read_json(folder / "mobilellm.json") if (folder / "mobilellm.json").is_file() else {}
    return Loaded(network=network.eval(), tokenizer=tokenizer, origin=origin)


def describe(path: Path) -> tuple[ModelConfig, dict[str, Any] | None, dict[str, Any]]:
    """Configuration, tokenizer facts and origin, without reading the weights."""
    folder = locate(path)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    facts = None if tokenizer is None else {k: getattr(tokenizer, k) for k in ("name", "vocab_size", "sha256")}
    origin = read_json(folder / "mobilellm.json") if (folder / "mobilellm.json").is_file() else {}
    return ModelConfig.read(folder / "config.json"), facts, origin
