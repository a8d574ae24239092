"""The optimizers of a run, built from its recipe by the entry of `OPTIMIZERS` that it names.

    optimizers = build(network, recipe.optimizer, Precision.FP32, recipe.learning_rate_factor)

Matrices inside the blocks are decayed, and go to Muon when the recipe says so; the embedding and
the norms go to AdamW. A new kind is one entry: how it is built, the tensors it keeps for each
parameter, and what these cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilellm.distributed.sharded import full
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.model.weights import stacks
from mobilellm.optimizers.cautious import CautiousAdamW
from mobilellm.optimizers.muon import Muon, known_at_once
from mobilellm.optimizers.transfer import TensorFactors, scale_rates
from mobilellm.plan.memory import OptimizerCosts
from mobilellm.recipe.recipe import OptimizerSection

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """What the rest of the project knows of a kind of optimizer."""

    build: Callable[[Network, OptimizerSection, Precision, bool], list[torch.optim.Optimizer]]
    """The torch optimizers over all parameters of a network; each group's "lr" is its peak. The
    last argument is whether a step may be AMX's."""
    costs: OptimizerCosts
    """Bytes it keeps for each parameter, and holds during a step."""


def _adamw(groups: list[Group], section: OptimizerSection) -> torch.optim.Optimizer:
    kind = CautiousAdamW if section.cautious_weight_decay else torch.optim.AdamW
    return kind(groups, betas=section.betas, eps=section.eps, fused=True)


def _outside(network: Network, section: OptimizerSection, embedding_decay: float) -> list[Group]:
    """AdamW's groups for what is not a matrix inside a block: the embedding (and an untied output
    layer), and all norms."""
    peak = section.embedding_learning_rate or section.learning_rate
    inside = _inside(network)
    embedding = [p for name, p in network.named_parameters() if p.ndim == 2 and name not in inside]
    norms = [p for p in network.parameters() if p.ndim == 1]
    return [
        {"params": embedding, "lr": peak, "weight_decay": embedding_decay},
        {"params": norms, "lr": peak, "weight_decay": 0.0},
    ]


def _inside(network: Network) -> dict[str, nn.Parameter]:
    """The matrices inside the blocks, by name."""
    return {
        name: p
        for name, p in network.named_parameters()
        if p.ndim == 2 and name.startswith("layers.")
    }


def _build_adamw(
    network: Network, section: OptimizerSection, _: Precision, __: bool
) -> list[torch.optim.Optimizer]:
    """AdamW for everything. Weight decay on every matrix, the embedding among them, as the paper's
    own recipe has it."""
    groups = _outside(network, section, embedding_decay=section.weight_decay)
    matrices = list(_inside(network).values())
    groups.append(
        {"params": matrices, "lr": section.learning_rate, "weight_decay": section.weight_decay}
    )
    return [_adamw(groups, section)]


def _build_muon(
    network: Network, section: OptimizerSection, precision: Precision, tiles: bool
) -> list[torch.optim.Optimizer]:
    """Muon or NorMuon for the matrices inside the blocks, AdamW for the rest. The embedding goes
    undecayed: its rows are updated rarely and at a rate of their own."""
    parts = {name: [rows for _, rows in found] for name, found in stacks(network.config).items()}
    by_parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for name, parameter in _inside(network).items():
        by_parts.setdefault(tuple(parts[name]), []).append(parameter)
    muon = Muon(
        [{"params": found, "parts": list(key)} for key, found in by_parts.items()],
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        dtype=precision.dtype,
        row_decay=section.betas[1] if section.name == "normuon" else 0.0,
        cautious=section.cautious_weight_decay,
        tiles=tiles,
    )
    return [muon, _adamw(_outside(network, section, embedding_decay=0.0), section)]


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(build=_build_adamw, costs=OptimizerCosts(matrix_bytes=8)),
} | dict.fromkeys(
    ("muon", "normuon"),
    OptimizerKind(build=_build_muon, costs=OptimizerCosts(matrix_bytes=4, orthogonalizes=True)),
)


def build(
    network: Network,
    section: OptimizerSection,
    precision: Precision,
    factor: float = 1.0,
    transfer: Mapping[str, TensorFactors] | None = None,
    tiles: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe, each group carrying its peak, times `factor`, as `peak_lr`, and
    its decay as `peak_decay`; `transfer` are the factors of each tensor; `tiles` is Muon's."""
    optimizers = OPTIMIZERS[section.name].build(network, section, precision, tiles)
    if transfer is not None:
        scale_rates(optimizers, network, transfer)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"], group["peak_decay"] = group["lr"] * factor, group["weight_decay"]
    return optimizers


def empty_state(optimizers: list[torch.optim.Optimizer]) -> None:
    """Give every parameter the state that its optimizer would make at its first step, as zeros to
    be loaded into."""
    for optimizer in optimizers:
        for parameter in parameters(optimizer):
            optimizer.state[parameter] = _state(optimizer, parameter)


def _state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The tensors that it keeps for a parameter, as it makes them at its first step."""
    if isinstance(optimizer, Muon):
        return optimizer.empty_state(parameter)
    return {
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
    }


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter that an optimizer updates."""
    for group in optimizer.param_groups:
        yield from group["params"]


def skip_when(optimizers: list[torch.optim.Optimizer], skip: Tensor) -> None:
    """Let the next step change nothing where `skip` (0-dim bool, on the device) is true; the host
    need not know."""
    flag = skip.float()
    for optimizer in optimizers:
        optimizer.found_inf = flag  # type: ignore[attr-defined]


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients of all parameters together to a norm of at most `limit`; returns the norm
    before, of the gradients of all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = nn.utils.get_total_norm(gradients, foreach=True)
    norm = full(total)
    if not known_at_once(norm) or not limit / (norm + 1e-6) >= 1:  # else it multiplies by 1
        nn.utils.clip_grads_with_norm_(parameters, limit, total, foreach=True)
    return norm


def set_learning_rate(
    optimizers: list[torch.optim.Optimizer], factor: float, decay: float = 1.0
) -> None:
    """Every group at `factor` times its peak, and at `decay` times its weight decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            group["weight_decay"] = group["peak_decay"] * decay
