"""A training run as settings: typed sections, read from TOML, overridden on the command line, written back resolved.

    [model]
    preset = "5M"
    [data]
    path = "data/shakespeare"
    sequence_length = 256
    [train]
    steps = 500
    batch_tokens = 8192

One precedence: defaults here, then the file, then the command line. The resolved result lies in the run folder and is a
recipe again. Unknown keys are refused.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilellm.errors import UserError, unknown_name
from mobilellm.files import write_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The network. Its vocabulary is that of the data's tokenizer."""

    preset: str = "5M"
    """A shipped size (1M, 5M, 15M, 125M, 125M-LS, 350M, 350M-LS, 600M, 1B, 1.5B), or the path of a config.json."""
    layer_repeats: int | None = None
    """Apply each block this many times in a row; the preset's when not given."""
    shared_kv: Literal["own", "first"] | None = None
    """With layer_repeats > 1: keys and values of each application, or those of the first; the preset's when not given."""
    num_hidden_layers: int | None = None
    """Blocks; the preset's when not given."""
    max_position_embeddings: int | None = None
    """The model's context in tokens; the preset's when not given."""
    initial_residual: Literal["normal", "zero"] = "normal"
    """First weights of the two matrices that write to the residual stream: like all others, or zero."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The tokens."""

    path: str = ""
    """A folder made by `mobilellm prepare`."""
    sequence_length: int = 256
    """Tokens a training sample."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The loop."""

    steps: int = 1000
    """Optimiser steps."""
    batch_tokens: int = 8192
    """Tokens a step, over all gradient accumulation: a multiple of sequence_length x micro_batch."""
    micro_batch: int = 0
    """Sequences in one forward and backward pass; 0 takes the whole batch at once, up to 16,384 tokens."""
    seed: int = 0
    """Seeds the first weights and the order of the samples."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products (weights and optimiser stay float32); auto measures which one the device is faster at."""
    compile: Literal["auto", "block", "off"] = "auto"
    """torch.compile, block by block; auto does so where a C++ compiler is found to work and the run is long enough."""
    evaluate_every: int = 100
    """Steps between held-out evaluations; 0 is only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is written at the end always."""
    keep_checkpoints: int = 3
    """The newest checkpoints that are kept; 0 keeps all."""
    log_every: int = 10
    """Steps between lines shown; metrics.jsonl has every step."""
    threads: int = 0
    """CPU threads; 0 is torch's choice."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimiser and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the matrices inside the blocks and adamw for the rest."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    embedding_learning_rate: float = 0.0
    """Peak for the embedding and norms; 0 is the same as learning_rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices inside the blocks and, with adamw, on the embedding; never on norms."""
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down. 0 is no limit."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to the last step."""
    final_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a training run."""

    model: ModelSection = field(default_factory=ModelSection)
    """The network."""
    data: DataSection = field(default_factory=DataSection)
    """The tokens."""
    train: TrainSection = field(default_factory=TrainSection)
    """The loop."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    """The optimiser and its schedule."""

    def check(self) -> None:
        """`UserError` for values that cannot work, whatever the model and data."""
        train, optimizer = self.train, self.optimizer
        for name, value, least in (
            ("data.sequence_length", self.data.sequence_length, 1), ("train.steps", train.steps, 1),
            ("train.batch_tokens", train.batch_tokens, 1), ("train.micro_batch", train.micro_batch, 0),
            ("train.evaluate_every", train.evaluate_every, 0), ("train.checkpoint_every", train.checkpoint_every, 1),
            ("train.keep_checkpoints", train.keep_checkpoints, 0), ("train.log_every", train.log_every, 1),
            ("train.threads", train.threads, 0), ("train.seed", train.seed, 0),
            ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name} = {value}: must be at least {least}")
        for name, number, low, high in (
            ("learning_rate", optimizer.learning_rate, 0.0, 1e3),
            ("embedding_learning_rate", optimizer.embedding_learning_rate, 0.0, 1e3),
            ("weight_decay", optimizer.weight_decay, 0.0, 1e3), ("clip", optimizer.clip, 0.0, 1e9),
            ("final_fraction", optimizer.final_fraction, 0.0, 1.0), ("momentum", optimizer.momentum, 0.0, 1.0),
            ("eps", optimizer.eps, 0.0, 1.0), ("betas", min(optimizer.betas), 0.0, 1.0),
            ("betas", max(optimizer.betas), 0.0, 1.0),
        ):  # fmt: skip
            if not (math.isfinite(number) and low <= number <= high):
                raise UserError(f"optimizer.{name} = {number}: must be from {low:g} to {high:g}")
        if train.seed >= 1 << 63:
            raise UserError(f"train.seed = {train.seed}: must be below 2^63")
        length, batch = self.data.sequence_length, train.batch_tokens
        if batch % length:
            nearest = max(1, round(batch / length)) * length
            raise UserError(
                f"train.batch_tokens = {batch} does not divide by data.sequence_length = {length}",
                mend=f"the nearest is {nearest}",
            )
        if train.micro_batch and (batch // length) % train.micro_batch:
            sequences = batch // length
            near = [n for n in range(1, sequences + 1) if sequences % n == 0]
            raise UserError(
                f"{sequences} sequences a step do not divide by train.micro_batch = {train.micro_batch}",
                mend=f"it can be {', '.join(map(str, near[:20]))}",
            )

    @property
    def micro_batch(self) -> int:
        """Sequences in one forward and backward pass."""
        if self.train.micro_batch:
            return self.train.micro_batch
        sequences = self.train.batch_tokens // self.data.sequence_length
        most = max(1, 16384 // self.data.sequence_length)
        return max(n for n in range(1, min(sequences, most) + 1) if sequences % n == 0)

    # --- TOML ---

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file. `UserError` for broken TOML, unknown keys (naming the nearest) and wrong types."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such recipe") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: broken TOML ({error})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        return typing.cast(Recipe, _build(cls, values, str(path), ""))

    def write(self, path: Path) -> None:
        """Write every setting as TOML; `read` gives an equal recipe."""
        import tomli_w

        sections = {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items() if value is not None}
            for name, section in dataclasses.asdict(self).items()
        }
        write_file(path, tomli_w.dumps(sections).encode())

    def replace(self, section: str, **changes: Any) -> Recipe:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **changes)})


def _build(cls: type, values: dict[str, Any], where: str, prefix: str) -> Any:
    """An instance of a dataclass from a TOML table, every key and type checked."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name("key", prefix + key, {prefix + name for name in known}, where)
        built[key] = _convert(hints[key], value, where, prefix + key)
    return cls(**built)


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: [{name}] must be a table")
        return _build(hint, value, where, name + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # only "X | None" occurs, and TOML has no null
        return _convert(next(a for a in arguments if a is not type(None)), value, where, name)
    if origin is Literal:
        if value not in arguments:
            raise unknown_name(f"{name} =", str(value), [str(a) for a in arguments], where)
        return value
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise UserError(f"{where}: {name} must be a list of {len(arguments)} numbers")
        return tuple(_convert(a, v, where, name) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name} = {value!r} must be of type {hint.__name__}")
    return value
