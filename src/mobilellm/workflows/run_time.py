"""How long a run takes, by a few real steps of it.

time = measure_run(recipe, data)
time.seconds(recipe)                # of the whole run, evaluations included
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mobilellm.data.dataset import Data
from mobilellm.distributed.world import World
from mobilellm.hardware.probes import pick_device
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.batches import Prefetch
from mobilellm.train.inputs import Weights
from mobilellm.train.loop import Trainer
from mobilellm.train.origin import read_origin
from mobilellm.train.resolve import resolve

WARM, MEASURED = 2, 5
MAX_SECONDS = 6.0
"""Of measured steps; at least two are made."""


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Seconds of the parts of a run."""

    step: float
    """Of a step, once its batch has all tokens."""
    update: float
    """Of a step, what takes as long whatever its batch: the optimizer's part."""
    evaluation: float
    """Of the whole held-out text."""
    start: float
    """From nothing to the first step, and as much again for the last checkpoint and the report;
    and what the first step takes longer than others, once the compiler has its work on disk."""

    def training(self, recipe: Recipe) -> float:
        """Of all steps."""
        token, step = self.costs(recipe)
        return token * recipe.tokens() + step * recipe.train.steps

    def costs(self, recipe: Recipe) -> tuple[float, float]:
        """Of a token, and of a step beside its tokens."""
        return (self.step - self.update) / recipe.train.batch_tokens, self.update

    def seconds(self, recipe: Recipe) -> float:
        """Of a whole run."""
        every, steps = recipe.train.evaluate_every, recipe.train.steps
        evaluations = -(-steps // every) if every else 1
        return self.start + self.training(recipe) + evaluations * self.evaluation


def measure_run(recipe: Recipe, data: Data, evaluation: float | None = None) -> RunTime:
    """Train a few steps of a recipe and evaluate once, unless how long that takes is given; nothing
    is written.

    `UserError` for one that cannot be trained at all.
    """
    begun = time.perf_counter()
    world = World(device=pick_device())
    recipe = resolve(recipe.replace("train", batch_doublings=0), world.device)
    if recipe.train.compile == "block":
        _compile(recipe, data, world)
        begun = time.perf_counter()
    trainer = Trainer(recipe, data, world=world, weights=_weights(recipe, data))
    start = time.perf_counter() - begun
    taken: list[float] = []
    updates: list[float] = []
    with contextlib.closing(Prefetch(trainer.loader(), world.device)) as fetched:
        for batch, _ in fetched:
            begun = time.perf_counter()
            loss = trainer.step.forward_backward(*batch)
            loss.item()  # waits for the device
            known = time.perf_counter()
            trainer.step.update(0, loss)[0].item()
            taken.append(time.perf_counter() - begun)
            updates.append(time.perf_counter() - known)
            enough = len(taken) >= WARM + MEASURED
            if enough or (len(taken) >= WARM + 2 and sum(taken[WARM:]) > MAX_SECONDS):
                break
    if evaluation is None:
        begun = time.perf_counter()
        trainer.evaluation.held_out()
        evaluation = time.perf_counter() - begun
    del trainer
    gc.collect()
    step, update = (statistics.median(each[WARM:]) for each in (taken, updates))
    first = max(0.0, taken[0] - step)
    return RunTime(step=step, update=update, evaluation=evaluation, start=2 * start + first)


def _compile(recipe: Recipe, data: Data, world: World) -> None:
    """Let the compiler keep what the first run would wait for; the others find it."""
    trainer = Trainer(recipe, data, world=world, weights=_weights(recipe, data))
    with contextlib.closing(Prefetch(trainer.loader(), world.device)) as fetched:
        trainer.step.forward_backward(*next(iter(fetched))[0]).item()
    del trainer
    gc.collect()
    torch._dynamo.reset()


def _weights(recipe: Recipe, data: Data) -> Weights | None:
    """The weights that a recipe starts from, where it names a model."""
    if not recipe.start.from_:
        return None
    return read_origin(Path(recipe.start.from_), data).weights
