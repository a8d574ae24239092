"""The records that a run writes and other rooms read: a row of metrics.jsonl, and result.json.

    row: MetricsRow = {"step": 1, "loss": 6.93, "tokens": 2048}
    add_figures(row, {"held_out_loss/books": 3.1})
    metrics_row(b'{"step": 1, "lo')        # None: a kill cut the line off

They stand on the ground because training writes them, reports read them, and neither may know the
other. JSON has no infinity: a number that is not finite is null on disk, so a reader meets None in
any field of a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import orjson
from typing_extensions import NotRequired  # Python 3.11 has it in typing

from mobilellm.errors import UserError


def check_run(folder: Path) -> None:
    """`UserError` for a folder that holds no run."""
    if not (folder / "recipe.toml").is_file():
        raise UserError(
            f"{folder}: no run here (no recipe.toml)",
            hint="give the folder that `mobilellm train --out` named",
        )


class MetricsRow(TypedDict, total=False):
    """One optimizer step, a line of metrics.jsonl.

    Evaluations, checkpoints and data add their fields to the rows of their steps. Beside these
    fields a row may hold some whose name contains another: "held_out_loss/SOURCE", "epochs/SOURCE",
    "TASK/acc"; `add_figures` adds them.
    """

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Training loss, nats a token."""
    learning_rate: float
    grad_norm: float
    """Norm of the gradient before it was clipped."""
    tokens: int
    """Tokens trained on so far, over all processes."""
    skipped: int
    """Steps skipped so far."""
    tokens_per_second: float
    """Speed of training alone, over all processes."""
    mfu_6n: float
    """Share of the device's peak FLOP/s, with 6 FLOPs a parameter and token."""
    mfu_palm: float
    """The same with attention's FLOPs counted as PaLM does (arXiv 2204.02311, appendix B)."""
    memory_bytes: int
    """Most memory that the device had in use."""
    seconds: float
    """Wall clock of this process since it began to train."""
    data_seconds: float
    compute_seconds: float
    optimizer_seconds: float
    checkpoint_seconds: float
    held_out_loss: float
    """Nats a token."""
    held_out_perplexity: float
    held_out_bits_per_byte: float
    reward_margin: float
    """Of pairs of answers: how far the chosen one's reward is above the rejected one's."""
    reward_accuracy: float
    """Share of the pairs where it is above."""
    held_out_preference_loss: float
    """On the held-out pairs, as the following."""
    held_out_reward_margin: float
    held_out_reward_accuracy: float


def add_figures(row: MetricsRow, figures: Mapping[str, float]) -> None:
    """Add figures whose names are known only when the run is: those of a source or a task."""
    cast("dict[str, Any]", row).update(figures)


def metrics_row(line: bytes) -> MetricsRow | None:
    """The row that a line of metrics.jsonl holds; None for a line that was cut off or altered."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    numbers = (int, float, type(None))
    return cast("MetricsRow", row) if all(type(v) in numbers for v in row.values()) else None


class HeldOut(TypedDict):
    """How well the last network predicts the held-out text."""

    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


class Sample(TypedDict):
    """A text that the network wrote, with the settings that drew it."""

    prompt: str
    text: str
    temperature: float
    top_k: int
    top_p: float
    seed: int


class Talk(TypedDict, total=False):
    """A held-out conversation, and how models answer in it."""

    asked: str
    """All that comes before the answer, with the template's special tokens."""
    said: str
    """The answer there."""
    base: str
    """What the model said that the run started from; absent where there is none any more."""
    tuned: str
    """What this run's model says."""


class Training(TypedDict):
    """Totals over every process that trained the run."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    teacher_flops: NotRequired[int]
    """What a teacher's forward passes took, 2 a parameter and token; absent without one, and where
    it cannot be read any more."""


class ModelFigures(TypedDict):
    """The network's shape and costs."""

    preset: str
    layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_repeats: int
    parameters: dict[str, int]
    """By kind, and "total"."""
    memory_bytes: dict[str, int]
    """Bytes of the weights by their type."""
    flops_per_token: dict[str, int]
    """Of training, by convention: "six_n", "palm"."""
    kv_cache_bytes_per_token: int


class SourceFigures(TypedDict):
    """One source of the training data."""

    name: str
    documents: int
    tokens: int
    bytes: int


class DataFigures(TypedDict, total=False):
    """The data of the run; empty for the original's layout, which has no manifest."""

    sources: list[SourceFigures]
    tokenizer: dict[str, Any]
    """Its `name` and `vocab_size`."""
    train_tokens: int
    held_out_tokens: int
    bytes_per_token: float
    scored: str
    """What of the held-out part is scored: its text, or the answers in it."""
    held_out: dict[str, Any]
    """The `rule` that chose the held-out text, and its `fraction`."""


class NextStep(TypedDict):
    """Something to do with the finished run, and the command that does it."""

    what: str
    command: str


class QuantizedFigures(TypedDict):
    """How well a run predicts its held-out text once its numbers are rounded."""

    bits_per_byte: float
    added_bits_per_byte: float
    """Over those of the run itself, in float32."""


class Result(TypedDict, total=False):
    """result.json: the final figures of a run; all fields are there once it has ended, none
    before."""

    name: str
    finished: str
    """When, in UTC, ISO 8601."""
    checkpoint: str
    """Its folder, relative to the run's."""
    held_out: HeldOut
    baselines: dict[str, Any]
    """Bits a byte of simpler predictors by name, and `bytes_compressed`, how much of the text they
    saw."""
    held_out_before: HeldOut
    """The same of the model that the run started from; absent where weights were drawn."""
    samples: list[Sample]
    conversations: list[Talk]
    """Of a training on conversations, side by side."""
    quantized: dict[str, QuantizedFigures]
    """By scheme, and as "float" the run itself; of the runs of a lab that asks for it."""
    training: Training
    model: ModelFigures
    data: DataFigures
    next: list[NextStep]
