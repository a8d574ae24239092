"""The optimizers of a run, built from its recipe, and the learning rate of each step.

Matrices inside the blocks are decayed, and go to Muon when the recipe says so; the embedding and the norms go to AdamW.
"""

from __future__ import annotations

import math

import torch

from mobilellm.model.network import Network
from mobilellm.model.weights import stacks
from mobilellm.train.muon import Muon
from mobilellm.train.recipe import OptimizerSection


def schedule(step: int, steps: int, section: OptimizerSection) -> float:
    """The factor on the peak learning rate at `step` (from 0): a linear rise, then the recipe's fall."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return 1.0
    if section.schedule == "wsd":
        decay = section.decay_steps or max(1, steps // 5)
        done = (step - (steps - decay) + 1) / decay  # 1 at the last step
        if done <= 0:
            return 1.0
        return 1 - (1 - section.final_lr_fraction) * (
            done if section.decay_shape == "linear" else math.sqrt(done)
        )
    # The last step, steps - 1, is where the fall ends.
    progress = min(1.0, (step - section.warmup_steps) / max(1, steps - 1 - section.warmup_steps))
    left = (
        1 - progress if section.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    )
    return section.final_lr_fraction + (1 - section.final_lr_fraction) * left


def build(
    network: Network, section: OptimizerSection, precision: str, factor: float = 1.0
) -> list[torch.optim.Optimizer]:
    """The optimizers, each group carrying its peak, times `factor`, as `peak_lr`."""
    inside = {
        name: p
        for name, p in network.named_parameters()
        if p.ndim == 2 and name.startswith("layers.")
    }
    outside = {name: p for name, p in network.named_parameters() if name not in inside}
    peak = section.learning_rate
    outside_peak = section.embedding_learning_rate or peak
    # With AdamW, weight decay on every matrix, the embedding among them, as the paper's own recipe has it. With Muon the
    # embedding goes undecayed: its rows are updated rarely and at a rate of their own.
    decayed = {"adamw": section.weight_decay, "muon": 0.0}[section.name]
    norms = [p for name, p in network.named_parameters() if p.ndim == 1]
    groups = [
        {
            "params": [p for p in outside.values() if p.ndim == 2],
            "lr": outside_peak,
            "weight_decay": decayed,
        },
        {"params": norms, "lr": outside_peak, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if section.name == "muon":
        parts = {
            name: [rows for _, rows in pieces] for name, pieces in stacks(network.config).items()
        }
        by_parts: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for name, parameter in inside.items():
            by_parts.setdefault(tuple(parts[name]), []).append(parameter)
        optimizers.append(
            Muon(
                [{"params": found, "parts": list(key)} for key, found in by_parts.items()],
                lr=peak,
                momentum=section.momentum,
                weight_decay=section.weight_decay,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            )
        )
    else:
        groups.append(
            {"params": list(inside.values()), "lr": peak, "weight_decay": section.weight_decay}
        )
    optimizers.append(torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"] * factor
    return optimizers


def skip_when(optimizers: list[torch.optim.Optimizer], skip: torch.Tensor) -> None:
    """Let the next step change nothing where `skip` (0-dim bool, on the device) is true; the host need not know."""
    flag = skip.float()
    for optimizer in optimizers:
        optimizer.found_inf = flag  # type: ignore[attr-defined]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Every group at `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
