"""What a run is made of: its data, its network's configuration, and the batches of one process.

data = open_data(recipe)
config = model_config(recipe, data)
for batch, state in batches(recipe, data, state, rank=0, world_size=1): ...
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mobilellm.data.dataset import Data, open_dataset
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.stream import Beside
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.recipe.recipe import DEFAULT_PRESET, Recipe

MAX_VERIFIED_BYTES = 32 << 30  # of tokens whose checksums are verified at every start, at 1 GB/s


@dataclass(frozen=True, kw_only=True)
class Weights:
    """First weights from elsewhere, under their names on disk, with the configuration of their
    network."""

    config: ModelConfig
    named: Mapping[str, Tensor] | None
    """None where a checkpoint of that shape is loaded afterwards."""


def open_data(recipe: Recipe, world: World | None = None) -> Data:
    """The data a recipe names; one process of all reads it whole, to check it."""
    if not recipe.data.path:
        raise UserError("data.path is not set", hint="name a folder made by `mobilellm prepare`")
    tokenizer = Path(recipe.data.tokenizer) if recipe.data.tokenizer else None
    data = open_dataset(Path(recipe.data.path), tokenizer)  # checks every size, which takes no time
    if world is not None and world.broadcast(data.fingerprint) != data.fingerprint:
        raise UserError(
            f"{data.path}: other data than rank 0 has", hint="let all nodes see one folder"
        )
    if world is not None and not world.main:
        return data
    tokens = len(data.tokens("train")) + len(data.tokens("held_out"))
    small = 2 * tokens <= MAX_VERIFIED_BYTES
    return open_dataset(data.path, tokenizer, verify=True) if small else data


def model_config(recipe: Recipe, data: Data, started: ModelConfig | None = None) -> ModelConfig:
    """The network's configuration: the recipe's model, with the vocabulary of the data's tokenizer.

    `started` is the configuration of the weights that the run starts from; the recipe's preset,
    where one is given too, must have its shape. `UserError` for overrides that no network can have,
    or a sequence longer than the context.
    """
    section = recipe.model
    base = ModelConfig.find(section.preset or DEFAULT_PRESET) if started is None else started
    tokens = {
        "vocab_size": data.vocab_size if started is None else started.vocab_size,
        "bos_token_id": data.bos_id,
        "eos_token_id": data.eos_id,
    }
    if fixed := sorted(tokens.keys() & section.override.keys()):
        raise UserError(
            f"model.override: {', '.join(fixed)} comes from the data's tokenizer",
            hint="leave it out, or prepare the data with another tokenizer",
        )
    config = ModelConfig.from_dict(base.to_dict() | section.override | tokens, "model.override")
    if started is not None:
        _check_shape(recipe, config, started)
    length = recipe.data.sequence_length
    if length > config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length = {length} exceeds the model's context of "
            f"{config.max_position_embeddings}",
            hint="shorten it, or raise max_position_embeddings in model.override",
        )
    return config


# What may differ from the network whose weights a run starts from: nothing that a weight's shape or
# meaning depends on.
FREE = {
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "initializer_range",
}
SHARING = {"layer_repeats", "shared_kv", "layer_order"}
"""Which blocks are applied when: an override may begin to share the blocks that it starts from."""


def _check_shape(recipe: Recipe, config: ModelConfig, started: ModelConfig) -> None:
    """`UserError` when the recipe asks for another network than the one it starts from."""
    asked = [("model.override", config, FREE | SHARING)]
    if recipe.model.preset:
        asked.append(("model.preset", ModelConfig.find(recipe.model.preset), FREE))
    own = dataclasses.asdict(started)
    for where, other, free in asked:
        values = dataclasses.asdict(other)
        differing = [
            f"{key} = {values[key]!r} where the weights have {own[key]!r}"
            for key in own.keys() - free
            if values[key] != own[key]
        ]
        if differing:
            raise UserError(
                f"{where}: another network than start.from = {recipe.start.from_!r} "
                f"({'; '.join(sorted(differing))})",
                hint=f"leave {where} out: the shape is that of the weights",
            )


def batches(
    recipe: Recipe,
    data: Data,
    state: DataState,
    rank: int,
    world_size: int,
    beside: Mapping[str, Beside] | None = None,
    step: int = 0,
) -> Loader | Mixture:
    """The endless batches of one process from `state` on, which `step` steps led to; `beside` is
    what lies beside each source.

    `UserError` for data shorter than a sample, and for stages that do not fit the data's sources.
    """
    section = recipe.data
    place = (rank, world_size)
    recipe.batching(world_size)  # every process gets as many
    sizes = (recipe.batch_tokens(i) // section.sequence_length for i in itertools.count(step))
    common = (section.sequence_length, sizes, state, *place, section.mask_documents)
    sources = getattr(data, "manifest", {}).get("sources", [])
    weighted = any(source.get("weight") is not None for source in sources)
    several = beside is not None and len(beside) > 1  # then each source is cut by itself
    if not section.stages and not weighted and not several:
        stream = data.tokens("train")
        stream.beside = next(iter(beside.values())) if beside else None
        return Loader(stream, *common)
    streams = {name: data.tokens("train", name) for name in data.sources()}
    for name, found in (beside or {}).items():
        streams[name].beside = found
    if not section.stages:  # prepared with weights, and nothing else is asked for
        return Mixture(streams, [Stage(until_tokens=None, weights=data.weights())], *common)
    last = section.stages[-1]  # it has no end, even if it names one
    stages = [
        Stage(until_tokens=None if s is last else s.until_tokens, weights=s.weights)
        for s in section.stages
    ]
    return Mixture(streams, stages, *common)
