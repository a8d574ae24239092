"""A training run as settings: typed sections, read from TOML, overridden on the command line, written back resolved.

    [model]
    preset = "5M"
    [data]
    path = "data/shakespeare"
    sequence_length = 256
    [[data.stages]]                # optional: other mixtures of the data's sources as the run goes on
    until_tokens = 3_000_000
    weights = {plays = 0.7, novels = 0.3}
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
import warnings
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
    qk_norm: bool | None = None
    """RMSNorm over each head's queries and keys (Qwen3's network); the preset's when not given."""
    initial_residual: Literal["normal", "zero"] = "normal"
    """First weights of the two matrices that write to the residual stream: like all others, or zero."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """A mixture of sources for a part of the run."""

    weights: dict[str, float] = field(default_factory=dict)
    """Source -> its share of the tokens; they are scaled to sum to one. A source left out is not read."""
    until_tokens: int = 0
    """Tokens trained on when this stage ends; 0, for the last one, is never."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The tokens."""

    path: str = ""
    """A folder made by `mobilellm prepare`, or the original's basepath/1..N/*.jsonl of token ids."""
    tokenizer: str = ""
    """Tokenizer folder or file, for the original's layout, which holds none."""
    sequence_length: int = 256
    """Tokens a training sample."""
    mask_documents: bool = False
    """Keep attention within each document of a sample."""
    stages: tuple[StageSection, ...] = ()
    """Mixtures of the sources, one after the other. Without any the weights given when preparing hold; without those, too, all
    tokens of all sources are read once an epoch."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    batch_tokens: int = 8192
    """Tokens a step, over all gradient accumulation: a multiple of sequence_length x micro_batch_size."""
    micro_batch_size: int = 0
    """Sequences in one forward and backward pass of one process; 0 finds it. Halved when the device's memory runs out."""
    seed: int = 0
    """Seeds the first weights and the order of the samples."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products (weights and optimizer stay float32); auto measures which one the device is faster at."""
    compile: Literal["auto", "block", "off"] = "auto"
    """torch.compile, block by block; auto does so where a C++ compiler is found to work and the run is long enough."""
    evaluate_every: int = 100
    """Steps between held-out evaluations; 0 is only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is written at the end always."""
    keep_checkpoints: int = 3
    """The newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none so."""
    async_checkpoints: bool = True
    """Write checkpoints while the training goes on."""
    spike_threshold: float = 0.0
    """Skip a step whose loss or gradient norm is more than this many standard deviations above its mean; 0 never does.
    One that is not finite is skipped always."""
    max_skipped_in_a_row: int = 5
    """Steps skipped in a row after which the run stops."""
    profile_steps: int = 0
    """Steps, from the 11th of this process on, recorded as a Chrome trace in the run's folder (profile-rank0.json)."""
    log_every: int = 10
    """Steps between lines shown; metrics.jsonl has every step."""
    threads: int = 0
    """CPU threads; 0 is torch's choice."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = "adamw"
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
    max_grad_norm: float = 1.0
    """Largest gradient norm; larger ones are scaled down. 0 is no limit."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate falls from its peak to the last step; wsd holds it and falls in the last decay_steps."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the peak."""
    decay_steps: int = 0
    """With wsd: the steps at the end over which the learning rate falls; 0 is a fifth of all."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """With wsd: the fall is linear, or 1 - sqrt(share done) (arXiv 2405.18392)."""
    reference_batch_tokens: int = 0
    """The batch that learning_rate is given for; 0 is the run's own."""
    batch_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows train.batch_tokens / reference_batch_tokens."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (PaLM has 1e-4)."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Several processes, as `torchrun` starts them."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """Every process holds everything and gradients are averaged, or weights, gradients and moments are sharded (FSDP2)."""
    shard_group_size: int = 0
    """With fsdp: shard over groups of this many processes and replicate over the groups (8: within a node); 0 is over all."""
    timeout: float = 600.0
    """Seconds after which a process that does not come to a meeting point ends the job."""


@dataclass(frozen=True, kw_only=True)
class TrackSection:
    """Where the metrics go beside metrics.jsonl."""

    tensorboard: bool = False
    """Write RUN/tensorboard."""
    trackio: str = ""
    """Project name for trackio."""
    wandb: str = ""
    """Project name for Weights & Biases."""
    every: int = 10
    """Steps between what is sent."""


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Zero-shot tasks during the training."""

    tasks: tuple[str, ...] = ()
    """Their names, as `mobilellm eval --tasks` has them."""
    every: int = 1000
    """Steps between evaluations; one is made at the end always."""
    limit: int = 200
    """Items of each task; 0 is all."""
    data: str = ""
    """Folder with the tasks' data; empty downloads it."""


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
    """The optimizer and its schedule."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    """Several processes."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Zero-shot tasks during the training."""
    track: TrackSection = field(default_factory=TrackSection)
    """Trackers."""

    def check(self) -> None:
        """`UserError` for values that cannot work, whatever the model and data."""
        train, optimizer = self.train, self.optimizer
        for name, value, least in (
            ("data.sequence_length", self.data.sequence_length, 1), ("train.steps", train.steps, 1),
            ("train.batch_tokens", train.batch_tokens, 1), ("train.micro_batch_size", train.micro_batch_size, 0),
            ("train.evaluate_every", train.evaluate_every, 0), ("train.checkpoint_every", train.checkpoint_every, 1),
            ("train.keep_checkpoints", train.keep_checkpoints, 0), ("train.log_every", train.log_every, 1),
            ("train.threads", train.threads, 0), ("train.seed", train.seed, 0),
            ("optimizer.warmup_steps", optimizer.warmup_steps, 0), ("optimizer.decay_steps", optimizer.decay_steps, 0),
            ("optimizer.reference_batch_tokens", optimizer.reference_batch_tokens, 0),
            ("train.keep_every", train.keep_every, 0), ("train.max_skipped_in_a_row", train.max_skipped_in_a_row, 1),
            ("train.profile_steps", train.profile_steps, 0), ("parallel.shard_group_size", self.parallel.shard_group_size, 0),
            ("eval.every", self.eval.every, 1), ("eval.limit", self.eval.limit, 0), ("track.every", self.track.every, 1),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"{name} = {value}: must be at least {least}")
        for name, number, low, high in (
            ("learning_rate", optimizer.learning_rate, 0.0, 1e3),
            ("embedding_learning_rate", optimizer.embedding_learning_rate, 0.0, 1e3),
            ("weight_decay", optimizer.weight_decay, 0.0, 1e3), ("max_grad_norm", optimizer.max_grad_norm, 0.0, 1e9),
            ("final_lr_fraction", optimizer.final_lr_fraction, 0.0, 1.0), ("momentum", optimizer.momentum, 0.0, 1.0),
            ("eps", optimizer.eps, 0.0, 1.0), ("betas", min(optimizer.betas), 0.0, 1.0),
            ("betas", max(optimizer.betas), 0.0, 1.0), ("z_loss", optimizer.z_loss, 0.0, 1.0),
        ):  # fmt: skip
            if not (math.isfinite(number) and low <= number <= high):
                raise UserError(f"optimizer.{name} = {number}: must be from {low:g} to {high:g}")
        if not (math.isfinite(train.spike_threshold) and train.spike_threshold >= 0):
            raise UserError(
                f"train.spike_threshold = {train.spike_threshold}: must be a number from 0 on"
            )
        if not (math.isfinite(self.parallel.timeout) and self.parallel.timeout > 0):
            raise UserError(
                f"parallel.timeout = {self.parallel.timeout}: must be a number of seconds above 0"
            )
        if optimizer.decay_steps > train.steps:
            raise UserError(
                f"optimizer.decay_steps = {optimizer.decay_steps} exceeds train.steps = {train.steps}"
            )
        self._check_stages()
        if train.seed >= 1 << 63:
            raise UserError(f"train.seed = {train.seed}: must be below 2^63")
        length, batch = self.data.sequence_length, train.batch_tokens
        if batch % length:
            nearest = max(1, round(batch / length)) * length
            raise UserError(
                f"train.batch_tokens = {batch} does not divide by data.sequence_length = {length}",
                hint=f"the nearest is {nearest}",
            )

    def _check_stages(self) -> None:
        before = 0
        for number, stage in enumerate(self.data.stages, 1):
            where = f"data.stages {number}"
            if not stage.weights:
                raise UserError(
                    f"{where}: no weights", hint="give it, for instance, weights = {name = 1.0}"
                )
            for name, weight in stage.weights.items():
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(
                        f"{where}: weight {weight} of {name!r}: must be a number from 0 on"
                    )
            if not sum(stage.weights.values()):
                raise UserError(f"{where}: all weights are 0")
            last = number == len(self.data.stages)
            if stage.until_tokens <= before and not (last and stage.until_tokens == 0):
                raise UserError(
                    f"{where}: until_tokens = {stage.until_tokens} must exceed the stage before ({before})"
                )
            before = stage.until_tokens

    @property
    def sequences(self) -> int:
        """Sequences a step, over all processes."""
        return self.train.batch_tokens // self.data.sequence_length

    def rows(self, world_size: int) -> int:
        """Sequences of one process a step. `UserError` names the nearest world sizes that divide the batch."""
        if self.sequences % world_size:
            near = sorted(
                (n for n in range(1, self.sequences + 1) if self.sequences % n == 0),
                key=lambda n: abs(n - world_size),
            )
            batches = [
                max(1, self.sequences // world_size) * world_size,
                (self.sequences // world_size + 1) * world_size,
            ]
            raise UserError(
                f"{self.sequences} sequences a step (train.batch_tokens / data.sequence_length) do not divide by "
                f"{world_size} processes",
                hint=f"use {' or '.join(map(str, sorted(near[:2])))} processes, or train.batch_tokens = "
                + " or ".join(str(n * self.data.sequence_length) for n in batches),
            )
        return self.sequences // world_size

    def micro_batch_size(self, world_size: int = 1) -> int:
        """Sequences in one forward and backward pass of one process: as given, else up to 16,384 tokens."""
        rows = self.rows(world_size)
        most = self.train.micro_batch_size or max(1, 16384 // self.data.sequence_length)
        return largest_divisor(rows, most)

    @property
    def learning_rate_factor(self) -> float:
        """What optimizer.learning_rate is multiplied by for this run's batch."""
        section = self.optimizer
        if not section.reference_batch_tokens or section.batch_scaling == "none":
            return 1.0
        ratio = self.train.batch_tokens / section.reference_batch_tokens
        return ratio if section.batch_scaling == "linear" else math.sqrt(ratio)

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
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """The recipe of `to_dict`'s values, checked as a file's are."""
        return typing.cast(Recipe, _build(cls, _renamed(values, where), where, ""))

    def write(self, path: Path) -> None:
        """Write every setting as TOML; `read` gives an equal recipe."""
        import tomli_w

        write_file(path, tomli_w.dumps(self.to_dict()).encode())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, as TOML has them: lists for tuples, and no key for what is not given."""
        return {
            name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in section.items()
                if value is not None
            }
            for name, section in dataclasses.asdict(self).items()
        }

    def replace(self, section: str, **changes: Any) -> Recipe:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(
            self, **{section: dataclasses.replace(getattr(self, section), **changes)}
        )


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is not above `most`."""
    return max(n for n in range(1, min(number, max(1, most)) + 1) if number % n == 0)


# Keys of recipes before 0.2, read for one release: (section, old key) -> the new one.
OLD_KEYS = {
    ("data", "stage"): "stages",
    ("train", "micro_batch"): "micro_batch_size",
    ("train", "skip_spikes"): "spike_threshold",
    ("train", "most_skipped"): "max_skipped_in_a_row",
    ("optimizer", "kind"): "name",
    ("optimizer", "clip"): "max_grad_norm",
    ("optimizer", "final_fraction"): "final_lr_fraction",
    ("parallel", "shard_within"): "shard_group_size",
}


def _renamed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with keys of an earlier version under their names of today, each told in one warning."""
    found = {
        name: dict(section) if isinstance(section, dict) else section
        for name, section in values.items()
    }
    for (section, old), new in OLD_KEYS.items():
        table = found.get(section)
        if not isinstance(table, dict) or old not in table:
            continue
        if new in table:
            raise UserError(
                f"{where}: both {section}.{new} and its old name {section}.{old} are given",
                hint=f"keep {section}.{new}",
            )
        warnings.warn(
            f"{where}: {section}.{old} is called {section}.{new} now", OldKeyWarning, stacklevel=4
        )
        table[new] = table.pop(old)
    return found


class OldKeyWarning(UserWarning):
    """A recipe uses a key's name of an earlier version."""


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
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} must be a table")
        return {
            key: _convert(arguments[1], entry, where, f"{name}.{key}")
            for key, entry in value.items()
        }
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, list):
            raise UserError(f"{where}: {name} must be a list")
        return tuple(_convert(arguments[0], entry, where, name) for entry in value)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise UserError(f"{where}: {name} must be a list of {len(arguments)} numbers")
        return tuple(_convert(a, v, where, name) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name} = {value!r} must be of type {hint.__name__}")
    return value
