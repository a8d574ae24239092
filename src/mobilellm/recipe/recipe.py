"""A training run as settings: typed sections, read from TOML, overridden on the command line,
written back resolved.

    [model]
    preset = "5M"
    override = {num_hidden_layers = 16, rope_theta = 5e5}
    [data]
    path = "data/shakespeare"
    sequence_length = 256
    # Optional: other mixtures of the data's sources as the run goes on.
    [[data.stages]]
    until_tokens = 3_000_000
    weights = {plays = 0.7, novels = 0.3}
    [train]
    steps = 500
    batch_tokens = 8192

One precedence: defaults here, then the file, then the command line. The resolved result lies in the
run folder and is a recipe again. Unknown keys are refused; the range of a setting stands on its
field.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mobilellm.divisors import nearest_multiples
from mobilellm.errors import UserError, first_line
from mobilellm.files import read_regular, write_file
from mobilellm.plan.batching import Batching, check_batch, either
from mobilellm.recipe.earlier_keys import renamed
from mobilellm.recipe.settings import build, check_ranges, plain
from mobilellm.recipe.tuning import (
    AverageSection,
    DistillSection,
    ObjectiveSection,
    QuantizeSection,
)
from mobilellm.schema import Above, AtLeast, Between

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OptimizerName = Literal["adamw", "muon", "normuon"]
ProductsName = Literal["auto", "torch", "mixed", "onednn", "bf16x6", "amx"]
PrecisionName = Literal["auto", "fp32", "bf16"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
DEFAULT_PRESET = "5M"


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The network. Its vocabulary is that of the data's tokenizer."""

    preset: str = ""
    """A shipped size (1M, 5M, 15M, 125M, 125M-LS, 350M, 350M-LS, 600M, 1B, 1.5B), or the path of a
    config.json. Empty is 5M, or the network of start.from."""
    override: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that differ from the preset's, such as num_hidden_layers, layer_repeats,
    shared_kv, rope_theta."""
    initial_residual: Literal["normal", "zero"] = "normal"
    """First weights of the two matrices that write to the residual stream: like all others, or
    zero."""


@dataclass(frozen=True, kw_only=True)
class StartSection:
    """Where the first weights come from."""

    from_: Annotated[str, tyro.conf.arg(name="from")] = ""
    """A model to go on from: a run, a checkpoint, a Hugging Face folder, a GGUF, anything that
    `mobilellm info` reads. Its shape is taken over, the optimizer begins anew, and rows for tokens
    that it does not have are the mean of its own. Empty draws the weights from train.seed."""


@dataclass(frozen=True, kw_only=True)
class StageSection:
    """A mixture of sources for a part of the run."""

    weights: dict[str, float] = field(default_factory=dict)
    """Source -> its share of the tokens; they are scaled to sum to one. A source left out is not
    read."""
    until_tokens: int = 0
    """Tokens trained on when this stage ends; 0, for the last one, is never."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The tokens."""

    path: str = ""
    """A folder made by `mobilellm prepare`, or the original's basepath/1..N/*.jsonl of token ids.
    """
    tokenizer: str = ""
    """Tokenizer folder or file, for the original's layout, which holds none."""
    sequence_length: Annotated[int, AtLeast(1)] = 256
    """Tokens a training sample."""
    mask_documents: bool = False
    """Keep attention within each document of a sample."""
    stages: tuple[StageSection, ...] = ()
    """Mixtures of the sources, one after the other. Without any the weights given when preparing
    hold; without those, too, all tokens of all sources are read once an epoch."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The loop."""

    steps: Annotated[int, AtLeast(1)] = 1000
    """Optimizer steps."""
    batch_tokens: Annotated[int, AtLeast(1)] = 8192
    """Tokens a step, over all gradient accumulation: a multiple of sequence_length x
    micro_batch_size."""
    batch_doublings: Annotated[int, Between(0, 16)] = 0
    """Times that the batch doubles before it is batch_tokens: with 2 the first has a quarter."""
    batch_doubling_steps: Annotated[int, AtLeast(1)] = 100
    """Steps before each doubling."""
    micro_batch_size: Annotated[int, AtLeast(0)] = 0
    """Sequences in one forward and backward pass of one process; 0 finds it, once for a run. Halved
    when the device's memory runs out."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Seeds the first weights, the order of the samples, and what dropout draws."""
    dropout: Annotated[float, Between(0, 0.9)] = 0.0
    """Share of the numbers that are zero in a training step where the embedding, an attention or a
    feed-forward writes to the residual stream, in multiples of 1/256; the others are scaled up. For
    text that is read many times."""
    precision: PrecisionName = "auto"
    """Of the matrix products (weights and optimizer stay float32); auto measures which one the
    device is faster at."""
    compile: Literal["auto", "block", "off"] = "auto"
    """torch.compile, block by block; auto does so where a C++ compiler is found to work and the run
    is long enough."""
    products: ProductsName = "auto"
    """How a CPU computes matrix products: by torch's own choice; in fp32 also by oneDNN, by mixed,
    which is oneDNN but in the gradients of weights, or by bf16x6, six bfloat16 products of AMX that
    give float32's digits; in bf16 also by amx, where Muon's step and the output layer's gradient
    are AMX's. auto measures which is fastest at the run's shapes, and takes amx where that is."""
    attention: Literal["auto", "torch", "tiles"] = "auto"
    """How a CPU computes attention with its gradients: by torch's operators, or in tiles by a
    library that a C++ compiler makes once (AVX-512 alone); auto takes tiles for a compiled run."""
    evaluate_every: Annotated[int, AtLeast(0)] = 100
    """Steps between held-out evaluations; 0 is only at the end."""
    checkpoint_every: Annotated[int, AtLeast(1)] = 500
    """Steps between checkpoints; one is written at the end always."""
    keep_checkpoints: Annotated[int, AtLeast(0)] = 3
    """The newest checkpoints that are kept; 0 keeps all."""
    keep_every: Annotated[int, AtLeast(0)] = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none so."""
    async_checkpoints: bool = True
    """Write checkpoints while the training goes on."""
    spike_threshold: Annotated[float, AtLeast(0)] = 0.0
    """Skip a step whose loss or gradient norm is more than this many standard deviations above its
    mean; 0 never does. One that is not finite is skipped always."""
    max_skipped_in_a_row: Annotated[int, AtLeast(1)] = 5
    """Steps skipped in a row after which the run stops."""
    profile_steps: Annotated[int, AtLeast(0)] = 0
    """Steps, from the 11th of this process on, recorded as a Chrome trace in the run's folder
    (profile-rank0.json)."""
    log_every: Annotated[int, AtLeast(1)] = 10
    """Steps between lines shown; metrics.jsonl has every step."""
    threads: Annotated[int, AtLeast(0)] = 0
    """CPU threads; 0 is torch's choice."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The optimizer and its schedule."""

    name: OptimizerName = "adamw"
    """adamw for everything, or muon for the matrices inside the blocks and adamw for the rest;
    normuon is muon with updates of equal size for every row (arXiv 2510.05491)."""
    learning_rate: Annotated[float, Between(0, 1e3)] = 2e-3
    """Peak learning rate."""
    embedding_learning_rate: Annotated[float, Between(0, 1e3)] = 0.0
    """Peak for the embedding and norms; 0 is the same as learning_rate."""
    betas: Annotated[tuple[float, float], Between(0, 1)] = (0.9, 0.95)
    """AdamW's decay rates of the two moments; the second is that of normuon's rows too."""
    eps: Annotated[float, Between(0, 1)] = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Between(0, 1)] = 0.95
    """Muon's momentum."""
    weight_decay: Annotated[float, Between(0, 1e3)] = 0.1
    """Decoupled weight decay, on matrices inside the blocks and, with adamw, on the embedding;
    never on norms."""
    weight_decay_schedule: Literal["constant", "learning_rate"] = "constant"
    """What a step takes away is this times the learning rate of the step; with learning_rate it
    falls once more, as that does from its peak."""
    cautious_weight_decay: bool = False
    """Shrink a weight only where the update does not make it larger (arXiv 2510.12402)."""
    max_grad_norm: Annotated[float, Between(0, 1e9)] = 1.0
    """Largest gradient norm; larger ones are scaled down. 0 is no limit."""
    warmup_steps: Annotated[int, AtLeast(0)] = 100
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: ScheduleName = "cosine"
    """How the learning rate falls from its peak to the last step; wsd holds it and falls in the
    last decay_steps."""
    final_lr_fraction: Annotated[float, Between(0, 1)] = 0.1
    """Learning rate of the last step, as a fraction of the peak."""
    decay_steps: Annotated[int, AtLeast(0)] = 0
    """With wsd: the steps at the end over which the learning rate falls; 0 is a fifth of all."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """With wsd: the fall is linear, or 1 - sqrt(share done) (arXiv 2405.18392)."""
    reference_batch_tokens: Annotated[int, AtLeast(0)] = 0
    """The batch that learning_rate is given for; 0 is the run's own."""
    batch_scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows train.batch_tokens / reference_batch_tokens."""
    z_loss: Annotated[float, Between(0, 1)] = 0.0
    """Weight of the squared log of the softmax's denominator (PaLM has 1e-4)."""


@dataclass(frozen=True, kw_only=True)
class TransferSection:
    """How first weights, learning rates and decays follow the network's size, so that what was
    tuned on a small network holds for a larger one. The checkpoint is a plain one."""

    kind: Literal["", "mup", "completep"] = ""
    """mup follows the width, completep width and depth. With adamw take optimizer.eps = 1e-15.
    Empty gives every size the same."""
    base_width: Annotated[int, AtLeast(1)] = 256
    """The hidden_size that optimizer.learning_rate and initializer_range are given for."""
    base_layers: Annotated[int, AtLeast(1)] = 8
    """With completep: the applied blocks that they are given for."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Several processes, as `torchrun` starts them."""

    kind: Literal["ddp", "fsdp"] = "ddp"
    """Every process holds everything and gradients are averaged, or weights, gradients and moments
    are sharded (FSDP2)."""
    shard_group_size: Annotated[int, AtLeast(0)] = 0
    """With fsdp: shard over groups of this many processes and replicate over the groups (8: within
    a node); 0 is over all."""
    timeout: Annotated[float, Above(0)] = 600.0
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
    every: Annotated[int, AtLeast(1)] = 10
    """Steps between what is sent."""


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """Zero-shot tasks during the training."""

    tasks: tuple[str, ...] = ()
    """Their names, as `mobilellm eval --tasks` has them."""
    every: Annotated[int, AtLeast(1)] = 1000
    """Steps between evaluations; one is made at the end always."""
    limit: Annotated[int, AtLeast(0)] = 200
    """Items of each task; 0 is all."""
    data: str = ""
    """Folder with the tasks' data; empty downloads it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a training run."""

    model: ModelSection = field(default_factory=ModelSection)
    """The network."""
    start: StartSection = field(default_factory=StartSection)
    """Where the first weights come from."""
    data: DataSection = field(default_factory=DataSection)
    """The tokens."""
    train: TrainSection = field(default_factory=TrainSection)
    """The loop."""
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    """The optimizer and its schedule."""
    transfer: TransferSection = field(default_factory=TransferSection)
    """Learning rates that hold at every size."""
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    """What a step minimizes."""
    distill: DistillSection = field(default_factory=DistillSection)
    """A teacher."""
    quantize: QuantizeSection = field(default_factory=QuantizeSection)
    """Quantization-aware training."""
    average: AverageSection = field(default_factory=AverageSection)
    """An average of the weights."""
    parallel: ParallelSection = field(default_factory=ParallelSection)
    """Several processes."""
    eval: EvalSection = field(default_factory=EvalSection)
    """Zero-shot tasks during the training."""
    track: TrackSection = field(default_factory=TrackSection)
    """Trackers."""

    def check(self) -> None:
        """`UserError` for values that cannot work, whatever the model and data."""
        for name, section in self.sections():
            check_ranges(section, f"{name}.")
        if self.optimizer.decay_steps > self.train.steps:
            raise UserError(
                f"optimizer.decay_steps = {self.optimizer.decay_steps} exceeds train.steps = "
                f"{self.train.steps}"
            )
        self._check_stages()
        self._check_objective()
        if self.train.seed >= 1 << 63:
            raise UserError(f"train.seed = {self.train.seed}: must be below 2^63")
        check_batch(self.data.sequence_length, self.train.batch_tokens)
        self._check_doublings(1)

    def _check_doublings(self, world_size: int) -> None:
        """`UserError` unless the first batch is one of whole sequences for every process."""
        doublings, length = self.train.batch_doublings, self.data.sequence_length
        share = world_size << doublings
        if doublings and self.train.batch_tokens % (length * share):
            fitting = nearest_multiples(length * share, self.train.batch_tokens)
            raise UserError(
                f"train.batch_doublings = {doublings}: a batch of {self.train.batch_tokens} tokens "
                f"does not divide by {1 << doublings} into sequences of {length}"
                + (f" for {world_size} processes" if world_size > 1 else ""),
                hint=f"use fewer, or train.batch_tokens = {either(fitting)}",
            )

    def _check_objective(self) -> None:
        if self.distill.teacher and self.distill.cache:
            raise UserError("distill.teacher and distill.cache: two teachers", hint="leave one out")
        if self.objective.name != "dpo":
            return
        where = "objective.name = 'dpo'"
        if not self.data.mask_documents:
            raise UserError(
                f"{where}: an answer would see the other one", hint="set data.mask_documents = true"
            )
        if self.distill.teacher or self.distill.cache or self.optimizer.z_loss:
            raise UserError(
                f"{where}: goes with neither distill nor optimizer.z_loss",
                hint="leave them out",
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
                    f"{where}: until_tokens = {stage.until_tokens} must exceed the stage before "
                    f"({before})"
                )
            before = stage.until_tokens

    def sections(self) -> Iterator[tuple[str, Any]]:
        """The sections with their names."""
        for section in dataclasses.fields(self):
            yield section.name, getattr(self, section.name)

    def batching(self, world_size: int = 1) -> Batching:
        """How a step is divided among so many processes. `UserError` names the nearest numbers that
        divide."""
        self._check_doublings(world_size)
        return Batching.of(
            sequence_length=self.data.sequence_length,
            batch_tokens=self.train.batch_tokens,
            world_size=world_size,
            micro_batch_size=self.train.micro_batch_size,
        )

    def batch_tokens(self, step: int) -> int:
        """Tokens of the step after `step` steps."""
        doubled = step // self.train.batch_doubling_steps
        return self.train.batch_tokens >> max(0, self.train.batch_doublings - doubled)

    def tokens(self, steps: int | None = None) -> int:
        """Tokens of the first `steps` steps, or of all."""
        train = self.train
        left = train.steps if steps is None else steps
        total = 0
        for doublings in range(train.batch_doublings, 0, -1):
            here = min(left, train.batch_doubling_steps)
            total += here * (train.batch_tokens >> doublings)
            left -= here
        return total + left * train.batch_tokens

    def steps_of(self, tokens: float, beside: float = 0.0) -> int:
        """The steps that take about as many tokens, each of them as many as its batch has and
        `beside`."""
        train, steps = self.train, 0.0
        for doublings in range(train.batch_doublings, 0, -1):
            one = (train.batch_tokens >> doublings) + beside
            here = min(train.batch_doubling_steps, tokens / one)
            tokens -= here * one
            steps += here
        return round(steps + tokens / (train.batch_tokens + beside))

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
        """Read a recipe file. `UserError` for broken TOML, unknown keys (naming the nearest) and
        wrong types; `CutRecipeError` for what is left of one that `write` wrote."""
        if not path.exists():
            raise UserError(f"{path}: no such recipe")
        try:
            text = read_regular(path, limit=MAX_RECIPE).decode()
            if _is_cut(text):
                raise CutRecipeError(f"{path}: cut short, or empty")
            values = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: broken TOML ({first_line(error)})") from None
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """The recipe of `to_dict`'s values, checked as a file's are."""
        return typing.cast(Recipe, build(cls, renamed(values, where), where))

    def write(self, path: Path) -> None:
        """Write every setting as TOML; `read` gives an equal recipe."""
        import tomli_w

        write_file(path, f"{HEAD}{tomli_w.dumps(self.to_dict())}{END}\n".encode())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, as TOML has them: lists for tuples, and no key for what is not
        given."""
        return {name: plain(section) for name, section in self.sections()}

    def replace(self, section: str, **changes: Any) -> Recipe:
        """A copy with some keys of one section changed."""
        return dataclasses.replace(
            self, **{section: dataclasses.replace(getattr(self, section), **changes)}
        )


class CutRecipeError(UserError):
    """A recipe file that `Recipe.write` wrote, and whose end is missing."""


def _is_cut(text: str) -> bool:
    """Whether the end is missing: what is left may be sound TOML, of fewer settings."""
    begun = text.startswith(HEAD) or HEAD.startswith(text)
    return (begun and not text.rstrip().endswith(END)) or "\0" in text


MAX_RECIPE = 1 << 20  # bytes of a recipe file

HEAD = "# Every setting, as resolved. The last line says that the file is whole.\n"
END = "# end of the recipe"
