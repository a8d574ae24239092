"""The bytes that a token reads: weights, each once, and the keys and values before it.

    weights_in(Path("m.gguf"))       # bytes of the matrices that multiply a token

Divided by the bandwidth of memory they are the least time that a token can take when nothing stays
in caches. A block that is applied several times counts once: the point of sharing it in immediate
neighbors is that it is read once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.interop.gguf_reader import header_of
from mobilellm.interop.load import describe
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts

HALF_CACHES = ("llama.cpp",)
"""Runtimes that keep keys and values in 16 bits; the others have 32."""


def config_of(path: Path) -> ModelConfig | None:
    """The configuration of a file: its own, or that beside it or a folder above; None where there
    is none that is ours."""
    places = [path] if path.is_dir() else [path, path.parent, path.parent.parent]
    for place in places:
        if place.is_dir() and not (place == path or (place / "config.json").is_file()):
            continue
        try:
            return describe(place)[0]
        except UserError:
            continue
    return None


def weights_in(path: Path) -> int | None:
    """Bytes of a file's weights that a token reads, each once; None where that cannot be told.

    A GGUF file names its tensors. Other files are taken whole: beside weights they hold next to
    nothing.
    """
    if path.is_dir():
        return None
    if path.suffix == ".gguf":
        try:
            tensors = header_of(path).tensors
        except UserError:  # without the package that knows the types' sizes, or another's file
            return path.stat().st_size
        looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
        return sum(t.size for name, t in tensors.items() if name not in looked_up)
    return path.stat().st_size


def bytes_per_token(
    weights: int | None,
    config: ModelConfig | None,
    runtime: str,
    number_bytes: int | None,
    positions: float,
) -> int | None:
    """Bytes that a token reads with `positions` tokens before it; `number_bytes` are those of a
    number in the cache, the runtime's usual when None."""
    if weights is None:
        return None
    if config is None:
        return weights
    number = number_bytes or (2 if runtime in HALF_CACHES else 4)
    return weights + ModelCosts.of(config).kv_cache_bytes(round(positions), number)


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """What a profile says of a network, for those who calculate with its figures."""
    costs = ModelCosts.of(config)
    return {
        "parameters": costs.parameters["total"],
        "read_parameters": read_parameters(config),
        "applied_parameters": costs.applied_parameters,
        "executed_layers": costs.executed_layers,
        "layer_repeats": config.layer_repeats,
        "attention_width": costs.attention_width,
        "kv_numbers_per_token": costs.kv_cache_bytes_per_token(1),
    }


def read_parameters(config: ModelConfig) -> int:
    """Parameters that a token reads, each once: all but an embedding that is not the output layer
    too."""
    parameters = ModelCosts.of(config).parameters
    return parameters["total"] - (0 if config.tie_word_embeddings else parameters["embedding"])
