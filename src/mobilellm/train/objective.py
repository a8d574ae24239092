"""What a run minimizes, from its recipe: the next token, that and a teacher, or pairs of answers.

    aim = build_objective(recipe, config, data, device)
    aim.objective, aim.beside

A teacher or a reference is read anew at every start of the run; it is never part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mobilellm.data.dataset import Data, SampleFolder
from mobilellm.data.stream import Beside
from mobilellm.derived.reference import Answers, Reference
from mobilellm.derived.teacher_cache import TeacherCache
from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.loss import NextToken, Objective
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.objectives.cached import CachedDistillation
from mobilellm.objectives.distillation import Distillation
from mobilellm.objectives.preference import Preference
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.origin import read_origin

START = "start"
"""The teacher that is the network of start.from as it was given."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a run minimizes, and what that needs beside the tokens."""

    objective: Objective
    beside: Mapping[str, Beside] = field(default_factory=dict)
    """By source of the training data; empty where nothing is needed."""
    reference: Reference | None = None
    """Of a training on pairs of answers."""


def build_objective(
    recipe: Recipe,
    config: ModelConfig,
    data: Data,
    device: torch.device,
    started: Network | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Aim:
    """What a run whose network has this configuration minimizes.

    `started` is the network of start.from as it was given, where the run has just begun.
    `UserError` for a teacher that cannot be read, has another tokenizer or vocabulary than the
    student, or a shorter context than the run's samples; and for data that the objective is not
    for.
    """
    z_loss, section = recipe.optimizer.z_loss, recipe.distill
    if recipe.objective.name == "dpo":
        return _preference(recipe, data, device, started, say)
    if data.preferences is not None:
        raise UserError(
            f"{data.path}: pairs of answers, half of which are not to be learnt",
            hint="set objective.name = 'dpo'",
        )
    if section.cache:
        cache = TeacherCache.open(
            Path(section.cache),
            data,
            sequence_length=recipe.data.sequence_length,
            mask_documents=recipe.data.mask_documents,
            vocab_size=config.vocab_size,
            temperature=section.temperature,
        )
        learning = CachedDistillation(section.weight, section.temperature, z_loss)
        return Aim(objective=learning, beside=cache.beside)
    if not section.teacher:
        return Aim(objective=NextToken(z_loss))
    teacher = read_teacher(recipe, config, data).to(device)
    return Aim(objective=Distillation(teacher, section.weight, section.temperature, z_loss))


def _preference(
    recipe: Recipe,
    data: Data,
    device: torch.device,
    started: Network | None,
    say: Callable[[str], None],
) -> Aim:
    """Training on pairs of answers, with the reference's log-probabilities beside the data."""
    if not recipe.start.from_:
        raise UserError(
            "objective.name = 'dpo': the run starts from no model",
            hint="set start.from; that model is the reference too",
        )
    if isinstance(data, SampleFolder) or data.preferences is None:
        raise UserError(
            f"{data.path}: holds no pairs of answers",
            hint="make such data with `mobilellm prepare --preferences`",
        )
    if recipe.data.sequence_length != data.row - 1:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length}: the pairs were packed into "
            f"rows for {data.row - 1}",
            hint=f"set data.sequence_length = {data.row - 1}, or prepare them again",
        )
    if started is None:  # the run goes on, or shares its blocks anew: its network is another
        started = read_origin(Path(recipe.start.from_), data).network().to(device)
    precision = Precision(recipe.train.precision)
    reference = Reference.of(started, data, precision, say)
    beside = {name: Answers(reference.tables["train"]) for name in data.sources()}
    return Aim(objective=Preference(recipe.objective.beta), beside=beside, reference=reference)


def read_teacher(recipe: Recipe, config: ModelConfig, data: Data) -> Network:
    """The network that a recipe names as its teacher, which is not trained."""
    itself = recipe.distill.teacher == START
    if itself and not recipe.start.from_:
        raise UserError(
            "distill.teacher = 'start': the run starts from no model", hint="set start.from"
        )
    path = recipe.start.from_ if itself else recipe.distill.teacher
    where = f"distill.teacher = {path!r}"
    origin = read_origin(Path(path), data, where)
    taught = origin.weights.config
    if not itself and (origin.facts["added_rows"] or taught.vocab_size != config.vocab_size):
        rows = taught.vocab_size - origin.facts["added_rows"]
        raise UserError(
            f"{where}: its vocabulary has {rows} rows, the student's {config.vocab_size}",
            hint="a teacher gives a probability to every token: both need one vocabulary",
        )
    length = recipe.data.sequence_length
    if length > taught.max_position_embeddings:
        raise UserError(
            f"{where}: its context of {taught.max_position_embeddings} is shorter than "
            f"data.sequence_length = {length}",
            hint="shorten data.sequence_length",
        )
    return origin.network()
