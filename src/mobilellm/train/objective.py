"""What a run minimizes, from its recipe: the next token, or the next token and a teacher.

    objective = build_objective(recipe, config, data, device)

A teacher is read anew at every start of the run; it is never part of a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mobilellm.errors import UserError
from mobilellm.interop.assemble import assemble
from mobilellm.model.config import ModelConfig
from mobilellm.model.distillation import Distillation
from mobilellm.model.loss import NextToken, Objective
from mobilellm.model.network import Network
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.inputs import Data
from mobilellm.train.origin import read_origin

START = "start"
"""The teacher that is the network of start.from as it was given."""


def build_objective(
    recipe: Recipe, config: ModelConfig, data: Data, device: torch.device
) -> Objective:
    """The objective of a run whose network has this configuration.

    `UserError` for a teacher that cannot be read, has another tokenizer or vocabulary than the
    student, or a shorter context than the run's samples.
    """
    z_loss, section = recipe.optimizer.z_loss, recipe.distill
    if not section.teacher:
        return NextToken(z_loss)
    teacher = read_teacher(recipe, config, data).to(device)
    return Distillation(teacher, section.weight, section.temperature, z_loss)


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
    assert origin.weights.named is not None
    return assemble(taught, origin.weights.named, where).eval().requires_grad_(False)
