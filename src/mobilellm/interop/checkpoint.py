"""A model on disk, in whatever format: found out, read, and written as our own.

    loaded = load(Path("runs/demo"))          # a run, a checkpoint, a Hugging Face folder, a GGUF or a llama2.c file
    loaded.network, loaded.tokenizer, loaded.origin

Our checkpoints are Hugging Face folders: config.json, model.safetensors, tokenizer files. Plain networks load in
transformers as they stand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.files import read_json, sha256_file, write_json
from mobilellm.model.config import ModelConfig, SharedKV
from mobilellm.model.generation import Sampling
from mobilellm.model.network import Network
from mobilellm.model.weights import to_named
from mobilellm.tokenizer.tokenizer import Tokenizer

Format = Literal["hf", "gguf", "llama2c"]
LLAMA2C_MAGIC = 0x616B3432  # "ak42", of version 1 and later


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model read from disk."""

    network: Network
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    """Where it came from, as far as the files say."""

    @property
    def config(self) -> ModelConfig:
        """The network's configuration."""
        return self.network.config

    def prompt_ids(self, text: str) -> list[int]:
        """Tokens of a prompt: behind BOS where the tokenizer puts one; an empty prompt begins with the end-of-text token."""
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer",
                hint="put its tokenizer.json or tokenizer.model into the folder",
            )
        opening = (
            [self.tokenizer.bos_id]
            if self.tokenizer.bos_id is not None and self.tokenizer.add_bos
            else []
        )
        ids = opening + self.tokenizer.encode(text)
        begin = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        return ids or ([] if begin is None else [begin])

    def continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """The text that `tokens` add to the prompt's (decoding both, since pieces can join across the border)."""
        assert self.tokenizer is not None
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        return self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(before) :]

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> str:
        """The text that follows `prompt`; greedy unless `sampling` says otherwise."""
        ids = self.prompt_ids(prompt)
        return self.continuation(
            ids, list(self.network.generate(ids, max_new_tokens, sampling, stop))
        )


def detect(path: Path) -> tuple[Format, Path]:
    """The format of what lies at `path`, and the folder or file that holds it. `UserError` when it is no model."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        return "hf", locate(path)
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"GGUF":
        return "gguf", path
    if path.suffix == ".bin":
        return "llama2c", path
    raise UserError(
        f"{path}: not a model file that is known",
        hint="give a run, a folder with config.json and weights, a .gguf file, or a llama2.c .bin",
    )


def locate(path: Path) -> Path:
    """The folder that holds config.json: `path`, or the newest checkpoint of the run there."""
    if (path / "config.json").is_file():
        return path
    if steps := sorted((path / "checkpoints").glob("step-????????")):
        return steps[-1]
    raise UserError(
        f"{path}: no model here", hint="give a run with a checkpoint, or a folder with config.json"
    )


def load(
    path: Path,
    *,
    shared_kv: SharedKV | None = None,
    fold: bool = False,
    tokenizer: Path | None = None,
) -> Loaded:
    """Read network and tokenizer, in float32.

    `shared_kv` says which kind of layer sharing a checkpoint has that does not say so itself. `fold` turns equal
    neighbouring blocks into repeats of one. `tokenizer` is used instead of the model's own.
    `UserError` names what is wrong with a file.
    """
    kind, where = detect(path)
    if kind == "gguf":
        from mobilellm.interop import gguf_reader

        loaded = gguf_reader.load(where)
    elif kind == "llama2c":
        from mobilellm.interop import llama2c

        loaded = llama2c.load(where, tokenizer)
    else:
        from mobilellm.interop import huggingface

        loaded = huggingface.load(where, shared_kv)
    if tokenizer is not None and kind != "llama2c":
        loaded = Loaded(
            network=loaded.network, tokenizer=Tokenizer.load(tokenizer), origin=loaded.origin
        )
    if fold:
        from mobilellm.interop.sharing import folded

        loaded = Loaded(
            network=folded(loaded.network), tokenizer=loaded.tokenizer, origin=loaded.origin
        )
    if loaded.tokenizer is not None and loaded.tokenizer.vocab_size > loaded.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {loaded.tokenizer.vocab_size} tokens, the embedding {loaded.config.vocab_size} rows",
            hint="they belong to different models",
        )
    loaded.network.eval()
    return loaded


def save_checkpoint(
    folder: Path, network: Network, tokenizer: Tokenizer | None, origin: dict[str, Any]
) -> None:
    """Write a checkpoint's files into an existing folder."""
    named = to_named(network.config, dict(network.named_parameters()))
    write_checkpoint(folder, network.config, named, tokenizer, origin)


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    named: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    origin: dict[str, Any],
) -> None:
    """The same from tensors under their names on disk."""
    write_json(folder / "config.json", config.to_dict())
    save_file(
        {name: tensor.cpu() for name, tensor in named.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(
        folder / "generation_config.json",
        {key: value for key, value in generation.items() if value is not None},
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "mobilellm.json", origin)


def describe(path: Path) -> tuple[ModelConfig, dict[str, Any] | None, dict[str, Any]]:
    """Configuration, facts of the tokenizer, and origin; a folder's weights are not read."""
    kind, where = detect(path)
    if kind == "hf":
        from mobilellm.interop import huggingface

        config, tokenizer, origin = huggingface.describe(where)
    else:
        loaded = load(path)
        config, tokenizer, origin = loaded.config, loaded.tokenizer, loaded.origin
    facts = (
        None
        if tokenizer is None
        else {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "sha256")}
    )
    return config, facts, {"format": kind} | origin


def source_hash(path: Path) -> str:
    """SHA-256 of a model file, or of the names and hashes of a folder's files."""
    _, where = detect(path)
    if where.is_file():
        return sha256_file(where)
    digest = hashlib.sha256()
    for file in sorted(p for p in where.iterdir() if p.is_file()):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def read_origin(folder: Path) -> dict[str, Any]:
    """What mobilellm.json says, where there is one."""
    if not (folder / "mobilellm.json").is_file():
        return {}
    origin = read_json(folder / "mobilellm.json", limit=1 << 20)
    return origin if isinstance(origin, dict) else {}
