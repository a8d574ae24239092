"""A recipe for a machine nobody has measured: the quickstart's settings, with as many steps as fit
the time.

The settings were found on tiny Shakespeare (docs/log.md); what bends with the text and the machine
is the number of steps and, through the device's probe, precision and compilation.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.hardware.probes import pick_device
from mobilellm.recipe.recipe import (
    DataSection,
    ModelSection,
    OptimizerSection,
    PrecisionName,
    Recipe,
    TrainSection,
)
from mobilellm.train.loop import Trainer
from mobilellm.train.resolve import resolve

SEQUENCE_LENGTH = 256
BATCH_TOKENS = 2048
MIN_STEPS = 30
EVALUATIONS = 8
MAX_EPOCHS = 5  # of a text: past that a small model learns it by heart and the held-out loss rises


def recipe_for(
    data_path: Path,
    preset: str,
    *,
    steps: int = 0,
    seconds: float = 150.0,
    seed: int = 0,
    precision: PrecisionName = "auto",
) -> Recipe:
    """The quickstart's recipe for prepared data, with `steps` steps, or as many as about `seconds`
    allow here.

    `UserError` when the data is shorter than one sample.
    """
    data = TokenFolder.open(data_path)
    available = len(data.tokens("train"))
    if available < 2:
        raise UserError(f"{data_path}: too little text to train on", hint="give a longer text")
    length = SEQUENCE_LENGTH
    while length > 8 and available < 4 * length:  # a short text: shorter samples
        length //= 2
    recipe = Recipe(
        model=ModelSection(preset=preset, initial_residual="zero"),
        data=DataSection(path=str(data_path), sequence_length=length),
        train=TrainSection(
            precision=precision,
            steps=steps or 10_000,
            batch_tokens=max(1, BATCH_TOKENS // length) * length,
            seed=seed,
            evaluate_every=0,
            checkpoint_every=10_000,
            keep_checkpoints=1,
        ),
        optimizer=OptimizerSection(
            name="muon",
            learning_rate=4e-3,
            weight_decay=0.1,
            warmup_steps=20,
            schedule="linear",
            final_lr_fraction=0.02,
        ),
    )
    if not steps:
        recipe = resolve(recipe, pick_device())
        step_seconds = measure(recipe, data)
        most = max(MIN_STEPS, MAX_EPOCHS * len(data.tokens("train")) // recipe.train.batch_tokens)
        steps = min(most, max(MIN_STEPS, int(seconds / step_seconds)))
    every = max(1, steps // EVALUATIONS)
    return recipe.replace(
        "train", steps=steps, evaluate_every=every, checkpoint_every=max(50, steps // 4)
    ).replace("optimizer", warmup_steps=min(recipe.optimizer.warmup_steps, max(1, steps // 5)))


def measure(recipe: Recipe, data: TokenFolder, steps: int = 8) -> float:
    """Seconds of one training step, the median of a few on a throw-away network after
    compilation."""
    trainer = Trainer(recipe, data)
    taken = []
    for number, (batch, _) in enumerate(trainer.loader()):
        start = time.perf_counter()
        loss = trainer.step.forward_backward(
            *(torch.from_numpy(a).to(trainer.device) for a in (batch.inputs, batch.targets))
        )
        trainer.step.update(0, loss)[0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
        if number == steps + 1:
            break
    return sorted(taken[2:])[steps // 2]
