"""Sections of a recipe for what comes after pretraining: pairs of answers, a teacher, a grid of
integers, an average of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mobilellm.schema import Above, AtLeast, Between


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """What a step minimizes."""

    name: Literal["next_token", "dpo"] = "next_token"
    """Cross-entropy of the next token, or direct preference optimization on pairs of answers that
    `mobilellm prepare --preferences` made; the network of start.from is the reference."""
    beta: Annotated[float, Above(0)] = 0.5
    """With dpo: how strongly the network is held to the reference; the smaller, the less."""


@dataclass(frozen=True, kw_only=True)
class DistillSection:
    """A teacher whose distributions the network learns from, beside the text."""

    teacher: str = ""
    """A model with the data's tokenizer: a run, a checkpoint, a Hugging Face folder, a GGUF. The
    word start names the network of start.from as it was given, for quantization-aware training.
    Empty is none."""
    cache: str = ""
    """A folder that `mobilellm distill` made of a teacher and these data: the teacher itself is not
    needed then, and samples are cut where it saw them cut. Empty is none."""
    weight: Annotated[float, Between(0, 1)] = 0.5
    """Share of the teacher in the loss; the rest is the cross-entropy of the text."""
    temperature: Annotated[float, Above(0)] = 1.0
    """Divides the logits of both before they are compared; above 1 unlikely tokens count more."""


@dataclass(frozen=True, kw_only=True)
class QuantizeSection:
    """Training for a grid of integers: every product sees the weights as `mobilellm quantize
    --method round` will leave them, and the gradients pass through to float32 ones."""

    scheme: Literal["", "int4", "8da4w", "int8", "w8a8"] = ""
    """The grid, as `mobilellm quantize` names it; 8da4w is int4 with 8-bit activations, as
    ExecuTorch computes. Empty trains for none."""
    embedding: Literal["int8", "float"] = "int8"
    """What becomes of the embedding and the output layer."""


@dataclass(frozen=True, kw_only=True)
class AverageSection:
    """An average of the weights. Where there is one, it is what checkpoints hold for others to
    load, and what held-out losses and tasks measure."""

    kind: Literal["", "ema", "tail"] = ""
    """ema forgets old weights at a fixed rate; tail gives all weights from a step on equal shares.
    Empty keeps none."""
    decay: Annotated[float, Between(0, 1)] = 0.999
    """With ema: the share of the old average that stays at each step; less of it at first."""
    start: Annotated[int, AtLeast(0)] = 0
    """Steps before the first weights that are taken in."""
