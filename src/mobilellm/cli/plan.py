"""`mobilellm plan`: what a training run will take.

    mobilellm plan --model 125M --tokens 1e12 --gpus 32 --device a100-80g

The figures are calculated, or with --measure taken from a few real steps here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.errors import UserError
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import OptimizerName
from mobilellm.terminal.output import print_json, put, say
from mobilellm.terminal.plan_lines import print_plan

if TYPE_CHECKING:
    from mobilellm.lab.latency import Forecast


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parameters, FLOPs, memory, steps, days, energy and cost of a training run, before it is paid.

    Example: mobilellm plan --model 125M --tokens 1e12 --gpus 32 --device a100-80g
    """

    model: str = "125M"
    """A shipped size, or the path of a config.json."""
    tokens: float = 1e12
    """Tokens to train on."""
    gpus: int = 32
    """Devices."""
    device: str = "a100-80g"
    """Kind of device; `--device list` shows them with their figures and sources."""
    sequence_length: int = 2048
    """Tokens a sample."""
    batch_tokens: int = 2_097_152
    """Tokens a step, over all devices."""
    micro_batch_size: int = 0
    """Sequences in one pass of one device; 0 takes the largest that fits, with --measure one."""
    precision: Annotated[Precision, tyro.conf.EnumChoicesFromValues] = Precision.BF16
    """Of the matrix products."""
    optimizer: OptimizerName = "adamw"
    """Its moments count."""
    fsdp: bool = False
    """Weights, gradients and moments sharded over all devices."""
    mfu: float = 0.0
    """Model FLOPs utilization (PaLM's count) to calculate with; 0 takes the documented model of
    efficiency."""
    price_per_gpu_hour: float = 0.0
    """Price of a device's hour."""
    price_per_kwh: float = 0.0
    """Price of energy, where it is not in the hour's."""
    measure: bool = False
    """Make a few real steps here instead and calculate with what they reach; --device and --gpus
    are then this machine."""
    profile: Path | None = None
    """A profile of a device (`mobilellm profile --json`): also what the model will take there."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Print the plan; 0 also for one that does not fit, which is said."""
        from mobilellm.hardware.devices import DEVICES

        if self.device == "list":
            for key, entry in DEVICES.items():
                put(
                    f"{key:14} {entry.bf16 / 1e12:6.0f} TFLOP/s bf16  "
                    f"{entry.memory / 1e9:4.0f} GB  {entry.bandwidth / 1e9:5.0f} GB/s  "
                    f"{entry.watts:4.0f} W  {entry.source}"
                )
            return 0
        config = self._config()
        if self.measure:
            from mobilellm.workflows.measured_plan import measured_plan

            plan = measured_plan(
                config,
                tokens=self.tokens,
                sequence_length=self.sequence_length,
                batch_tokens=self.batch_tokens,
                micro_batch_size=self.micro_batch_size,
                optimizer=self.optimizer,
                say=say,
            )
        else:
            from mobilellm.optimizers.optimizer import OPTIMIZERS
            from mobilellm.plan.run import plan_run

            plan = plan_run(
                config,
                tokens=self.tokens,
                device_name=self.device,
                count=self.gpus,
                sequence_length=self.sequence_length,
                batch_tokens=self.batch_tokens,
                micro_batch_size=self.micro_batch_size,
                precision=self.precision,
                optimizer=OPTIMIZERS[self.optimizer].costs,
                sharded=self.fsdp,
                mfu=self.mfu,
                price_per_gpu_hour=self.price_per_gpu_hour,
                price_per_kwh=self.price_per_kwh,
            )
        there: list[Forecast] = []
        if self.profile is not None:
            from mobilellm.lab.latency import forecasts

            there = forecasts(self.profile, config)
        if self.json:
            print_json({**plan, "on_device": there})
        else:
            print_plan(plan, there)
        return 0

    def _config(self) -> Any:
        from mobilellm.model.config import ModelConfig

        config = ModelConfig.find(self.model)
        if self.sequence_length > config.max_position_embeddings:
            raise UserError(
                f"--sequence-length {self.sequence_length} exceeds the model's context of "
                f"{config.max_position_embeddings}"
            )
        return config
