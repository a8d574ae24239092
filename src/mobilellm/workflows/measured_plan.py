"""A plan from a few real steps on this machine.

    plan = measured_plan(
        ModelConfig.preset("5M"), tokens=1e8, sequence_length=256, batch_tokens=2048,
        micro_batch_size=0, optimizer="adamw",
    )
    plan["days"]

One micro-batch and one update are timed. A step of the plan is as many micro-batches as make up
its batch, and one update.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from mobilellm.distributed.parallel import Parallel
from mobilellm.distributed.world import World
from mobilellm.hardware.description import describe
from mobilellm.hardware.device_memory import peak_memory, total_memory
from mobilellm.hardware.probes import peak_flops, pick_device
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.optimizers.optimizer import OPTIMIZERS, build, clip_gradients
from mobilellm.plan.memory import estimate
from mobilellm.plan.run import Plan
from mobilellm.recipe.recipe import DataSection, OptimizerSection, Recipe, TrainSection
from mobilellm.train.resolve import resolve_for

STEPS = 5


def measured_plan(
    config: ModelConfig,
    *,
    tokens: float,
    sequence_length: int,
    batch_tokens: int,
    micro_batch_size: int,
    optimizer: str,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """The same data as plan_run's, for this device alone, from the median of a few steps.

    `micro_batch_size` 0 is one sequence; one that does not divide the batch is lowered to one that
    does. The tokens are random. `UserError` when the batch does not divide into sequences.
    """
    world = World(device=pick_device())
    recipe = Recipe(
        data=DataSection(sequence_length=sequence_length),
        train=TrainSection(
            batch_tokens=batch_tokens, micro_batch_size=micro_batch_size or 1, steps=1000
        ),
        optimizer=OptimizerSection(name=optimizer),  # type: ignore[arg-type]
    )
    recipe = resolve_for(recipe, config, world.device)
    batching = recipe.batching()
    micro = batching.micro_batch_size
    precision = Precision(recipe.train.precision)
    say(f"measuring {STEPS} steps of {micro} x {sequence_length} tokens, {precision}")
    network = Network(config).to(world.device)
    step = Parallel(network, recipe, world)
    optimizers = build(network, recipe.optimizer, precision, tiles=step.kernels.amx)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (micro, sequence_length + 1), generator=generator).to(
        world.device
    )
    passes, updates = [], []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        loss = step(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        loss.backward()
        loss.item()  # waits for the device
        between = time.perf_counter()
        clip_gradients(list(network.parameters()), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        next(network.parameters()).view(-1)[0].item()  # waits for the device
        passes.append(between - start)
        updates.append(time.perf_counter() - between)
    seconds = batching.passes * statistics.median(passes[2:]) + statistics.median(updates[2:])
    numbers = ModelCosts.of(config)
    flops, speed = numbers.flops_per_token(sequence_length), batch_tokens / seconds
    peak = peak_flops(world.device, precision.dtype)
    memory = estimate(config, batching, precision=precision, optimizer=OPTIMIZERS[optimizer].costs)
    room = total_memory(world.device)
    name = str(describe(world.device)["device"])
    return {
        "parameters": numbers.parameters["total"],
        "tokens": int(tokens),
        "tokens_per_parameter": tokens / numbers.parameters["total"],
        "flops_per_token": flops,
        "flops": flops["palm"] * tokens,
        "device": name,
        "devices": 1,
        "device_facts": {"name": name, "memory": room, "source": "measured on this machine"},
        "precision": precision.value,
        "mfu_palm": speed * flops["palm"] / peak,
        "mfu_6n": speed * flops["six_n"] / peak,
        "mfu_from": (
            f"{STEPS} steps measured here, against {peak / 1e9:,.0f} GFLOP/s in a product alone"
        ),
        "tokens_per_second_per_device": speed,
        "tokens_per_second": speed,
        "batch_tokens": batch_tokens,
        "steps": math.ceil(tokens / batch_tokens),
        "step_seconds": seconds,
        "micro_batch_size": micro,
        "memory_bytes": memory.parts | {"peak": memory.peak},
        "measured_peak_bytes": peak_memory(world.device),
        "fits": memory.peak <= room,
        "days": tokens / speed / 86400,
        "gpu_hours": tokens / speed / 3600,
        "energy_kwh": None,
        "cost": None,
    }
