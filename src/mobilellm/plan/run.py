"""What a training run will take: steps, time, energy and money, before it is paid.

    plan = plan_run(ModelConfig.preset("125M"), tokens=1e12, device_name="a100-80g", count=32)
    plan["days"]

One model of efficiency: MFU (PaLM's count, attention included) = 0.9 x d / (d + 450) on an A100,
where d is the network's width. Wide products reach nine tenths of the peak, narrow ones are held up
by memory and launches; half is reached at a width of 450. On another device that width grows with
its ratio of peak rate to memory bandwidth. Fitted to the five training times that the original
states (1T tokens on 32 A100-80G: 3, 6, 8, 12, 18 days), which it meets within 13 %. A measured MFU
replaces it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypedDict

from mobilellm.divisors import divisors
from mobilellm.errors import UserError
from mobilellm.hardware.devices import DEVICES, Device, device
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.precision import Precision
from mobilellm.plan.batching import Batching
from mobilellm.plan.memory import Memory, OptimizerCosts, estimate

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # Python 3.11 has it in typing


class Plan(TypedDict):
    """What a run will take, as it is printed as JSON. Times are of all devices together."""

    parameters: int
    tokens: int
    tokens_per_parameter: float
    flops_per_token: dict[str, int]
    """By convention: six_n and palm (see model/costs.py)."""
    flops: float
    """FLOPs in all, PaLM's count."""
    device: str
    devices: int
    device_facts: dict[str, Any]
    """Name, memory in bytes, peak rates in FLOP/s and the source of these figures."""
    precision: str
    mfu_palm: float
    mfu_6n: float
    mfu_from: str
    """Where the efficiency is from: given, measured, or the formula."""
    tokens_per_second_per_device: float
    tokens_per_second: float
    batch_tokens: int
    steps: int
    step_seconds: float
    micro_batch_size: int
    memory_bytes: dict[str, int]
    """Bytes of one device by part, and their peak."""
    measured_peak_bytes: NotRequired[int]
    """The most bytes that the measured steps held."""
    fits: bool
    days: float
    gpu_hours: float
    energy_kwh: float | None
    cost: float | None


ADAMW = OptimizerCosts(matrix_bytes=8)
HIGHEST_MFU = 0.9
HALF_WIDTH = 450.0
RIDGE = DEVICES["a100-80g"].bf16 / DEVICES["a100-80g"].bandwidth


def expected_mfu(config: ModelConfig, on: Device) -> float:
    """Model FLOPs utilization (PaLM's count) expected of a bf16 training on one kind of device."""
    return HIGHEST_MFU * config.hidden_size / (config.hidden_size + half_width(on))


def half_width(on: Device) -> float:
    """The width of a network that reaches half of the highest MFU on a kind of device."""
    return HALF_WIDTH * (on.bf16 / on.bandwidth) / RIDGE


def plan_run(
    config: ModelConfig,
    *,
    tokens: float,
    device_name: str,
    count: int,
    sequence_length: int = 2048,
    batch_tokens: int = 2_097_152,
    micro_batch_size: int = 0,
    precision: Precision = Precision.BF16,
    optimizer: OptimizerCosts = ADAMW,
    sharded: bool = False,
    mfu: float = 0.0,
    price_per_gpu_hour: float = 0.0,
    price_per_kwh: float = 0.0,
) -> Plan:
    """The plan as plain data. `mfu` 0 takes the expected one; `micro_batch_size` 0 the largest that
    fits.

    `UserError` for a run that cannot be: too few tokens, more devices than sequences, a model that
    does not fit at all.
    """
    on = device(device_name)
    if not (math.isfinite(tokens) and tokens >= 1):
        raise UserError(f"{tokens:g} tokens: must be at least 1")
    if count < 1:
        raise UserError(f"{count} devices: must be at least 1")
    if not 0 <= mfu <= 1:
        raise UserError(f"mfu = {mfu}: must be from 0 to 1")
    batching = Batching.of(
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        world_size=count,
        micro_batch_size=micro_batch_size,
    )
    numbers = ModelCosts.of(config)
    flops = numbers.flops_per_token(sequence_length)
    rate = mfu or expected_mfu(config, on)
    peak = on.peak_flops(precision.dtype)
    speed = peak * rate / flops["palm"]

    def needs(division: Batching) -> Memory:
        return estimate(
            config,
            division,
            precision=precision,
            optimizer=optimizer,
            sharded=sharded,
            compiled=True,
        )

    usable = 0.92 * on.memory  # the rest is the driver's, the kernels' and the allocator's
    if not micro_batch_size:
        divisions = [batching.with_micro_batch(n) for n in divisors(batching.rows)]
        fitting = [division for division in divisions if needs(division).peak <= usable]
        batching = fitting[-1] if fitting else divisions[0]
    memory = needs(batching)
    seconds = tokens / (speed * count)
    hours = seconds / 3600 * count
    energy = hours * on.watts / 1e3
    return {
        "parameters": numbers.parameters["total"],
        "tokens": int(tokens),
        "tokens_per_parameter": tokens / numbers.parameters["total"],
        "flops_per_token": flops,
        "flops": flops["palm"] * tokens,
        "device": device_name.lower(),
        "devices": count,
        "device_facts": dataclasses.asdict(on),
        "precision": precision.value,
        "mfu_palm": rate,
        "mfu_6n": rate * flops["six_n"] / flops["palm"],
        "mfu_from": "given" if mfu else f"{HIGHEST_MFU} x width / (width + {half_width(on):.0f})",
        "tokens_per_second_per_device": speed,
        "tokens_per_second": speed * count,
        "batch_tokens": batch_tokens,
        "steps": math.ceil(tokens / batch_tokens),
        "step_seconds": batch_tokens / (speed * count),
        "micro_batch_size": batching.micro_batch_size,
        "memory_bytes": memory.parts | {"peak": memory.peak},
        "fits": memory.peak <= usable,
        "days": seconds / 86400,
        "gpu_hours": hours,
        "energy_kwh": energy,
        "cost": hours * price_per_gpu_hour + energy * price_per_kwh
        if price_per_gpu_hour or price_per_kwh
        else None,
    }
