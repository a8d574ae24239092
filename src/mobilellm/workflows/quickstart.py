"""A recipe for a machine that nobody has measured: as many steps as fit the time.

    precision = fast_precision_for("5M", vocab_size=2048, seconds=150)
    recipe = recipe_for(Path("runs/demo-data"), "5M", seconds=150, precision=precision)

The settings were found on tiny Shakespeare (docs/log.md); what follows from the text and the
machine is the number of steps and, through the device's probe, precision and compilation.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.hardware.device_memory import total_memory
from mobilellm.hardware.probes import peak_flops, pick_device
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.precision import Precision
from mobilellm.optimizers.optimizer import OPTIMIZERS
from mobilellm.plan.batching import Batching
from mobilellm.plan.memory import estimate
from mobilellm.recipe.recipe import (
    DataSection,
    ModelSection,
    OptimizerName,
    OptimizerSection,
    PrecisionName,
    Recipe,
    TrainSection,
)
from mobilellm.train.inputs import model_config
from mobilellm.train.loop import Trainer
from mobilellm.train.resolve import resolve_for

SEQUENCE_LENGTH = 256
BATCH_TOKENS = 2048
OPTIMIZER: OptimizerName = "muon"
MIN_STEPS = 30
MIN_SECONDS_TO_COMPILE = 60.0  # compiling costs 10 to 30 s, which are not counted
EVALUATIONS = 8
MAX_SCORING = 0.2  # of the time, for held-out scores during the training
# Training's FLOP/s as a share of a matrix product's: the best seen on a CPU, and a common value.
BEST_EFFICIENCY, COMMON_EFFICIENCY = 0.8, 0.35
PROBES = 4  # of the machine's speed, before a size is refused
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

    `UserError` when the data is shorter than one sample, or the time too short for `MIN_STEPS`.
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
            name=OPTIMIZER,
            learning_rate=6e-3,
            weight_decay=0.8,
            warmup_steps=20,
            schedule="linear",
            final_lr_fraction=0.02,
        ),
    )
    evaluations = EVALUATIONS
    if not steps:
        if seconds < MIN_SECONDS_TO_COMPILE:
            recipe = recipe.replace("train", compile="off")
        recipe = resolve_for(recipe, model_config(recipe, data), pick_device())
        step_seconds = measure(recipe, data, seconds=seconds / 4)
        steps = int(seconds / step_seconds)
        if steps < MIN_STEPS:
            raise too_large(preset, seconds, step_seconds)
        most = max(MIN_STEPS, MAX_EPOCHS * available // recipe.train.batch_tokens)
        steps = min(most, steps)
        # Scoring costs about a third of training on as many tokens.
        score_seconds = step_seconds * len(data.tokens("held_out")) / recipe.train.batch_tokens / 3
        evaluations = max(1, min(EVALUATIONS, int(MAX_SCORING * seconds / score_seconds)))
    every = max(1, steps // evaluations)
    return recipe.replace(
        "train", steps=steps, evaluate_every=every, checkpoint_every=max(50, steps // 4)
    ).replace("optimizer", warmup_steps=min(recipe.optimizer.warmup_steps, max(1, steps // 5)))


def fast_precision_for(preset: str, vocab_size: int, seconds: float) -> PrecisionName:
    """The precision this machine is fast at, for a size that it can train in `seconds`.

    Before anything is built, the training of a few steps is estimated from its FLOPs and the speed
    of a matrix product here, and its memory is counted. `UserError` when the machine's memory or
    the time does not suffice, with the minutes that would.
    """
    device = pick_device()
    precision = Precision.fast_on(device)
    config = dataclasses.replace(ModelConfig.preset(preset), vocab_size=vocab_size)
    batching = Batching.of(sequence_length=SEQUENCE_LENGTH, batch_tokens=BATCH_TOKENS)
    needed = estimate(
        config, batching, precision=precision, optimizer=OPTIMIZERS[OPTIMIZER].costs, compiled=True
    ).peak
    if needed > total_memory(device):
        raise UserError(
            f"training {preset} takes {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{total_memory(device) / 1e9:.1f} GB",
            hint="give a smaller --preset",
        )
    flops = ModelCosts.of(config).flops_per_token(SEQUENCE_LENGTH)["palm"] * BATCH_TOKENS
    peak, shortest = 0.0, math.inf
    for _ in range(PROBES):  # other work on the machine may slow one probe, but seldom all of them
        peak = max(peak, peak_flops(device, precision.dtype))
        shortest = MIN_STEPS * flops / (BEST_EFFICIENCY * peak)
        if seconds >= shortest:
            break
    if seconds < shortest:
        raise too_large(preset, seconds, flops / (COMMON_EFFICIENCY * peak))
    return "bf16" if precision is Precision.BF16 else "fp32"


def too_large(preset: str, seconds: float, step_seconds: float) -> UserError:
    """The error for a size that does not get `MIN_STEPS` steps in the time, with the least time."""
    minutes = math.ceil(MIN_STEPS * step_seconds / 6) / 10
    return UserError(
        f"{preset} cannot be trained here in {seconds / 60:g} minutes: a step takes about "
        f"{step_seconds:.1f} s, and fewer than {MIN_STEPS} are no training",
        hint=f"give --minutes {minutes:g} or more, or a smaller --preset",
    )


def measure(recipe: Recipe, data: TokenFolder, steps: int = 8, seconds: float = math.inf) -> float:
    """Seconds of one training step, the median of a few on a throw-away network.

    Two steps come before, in which the network is compiled. After `seconds` it makes do with fewer.
    """
    trainer = Trainer(recipe, data)
    taken: list[float] = []
    for number, (batch, _) in enumerate(trainer.loader()):
        start = time.perf_counter()
        loss = trainer.step.forward_backward(
            *(torch.from_numpy(a).to(trainer.device) for a in (batch.inputs, batch.targets))
        )
        trainer.step.update(0, loss)[0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
        if number == steps + 1 or (len(taken) > 2 and sum(taken) > seconds):
            break
    return statistics.median(taken[2:])
