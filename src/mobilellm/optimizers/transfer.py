"""Learning rates that hold at every width and depth: muP (arXiv 2203.03466) and CompleteP (arXiv
2505.01618), as factors of each tensor's first standard deviation, learning rate and weight decay.

    table = transfer_factors(network, recipe)
    table["layers.0.mlp.down_proj.weight"].learning_rate

Both are usually written as multipliers inside the network. A multiplier a of a weight is the same
as a weight drawn a times as large and trained at a times the learning rate with decay / a, where
the optimizer's updates do not depend on the gradient's size (AdamW with a tiny eps, Muon). So
nothing of the network changes, and its checkpoint is a plain Llama.

With w = hidden_size / base_width and, for completep, d = applied blocks / base_layers (else 1):

| tensor | first deviation | learning rate, AdamW | learning rate, (Nor)Muon |
|---|---|---|---|
| embedding, output layer, norms in blocks | 1 | 1 | (AdamW) |
| qkv, gate and up | 1 / sqrt(w) | 1 / w | 1 / sqrt(w) |
| o, down | 1 / (sqrt(w) d) | 1 / (w d) | 1 / (sqrt(w) d) |
| last norm | 1 / w | 1 / w | (AdamW) |

The decay is multiplied by the inverse of the learning rate's factor, so that their product, the
share of a weight that a step takes away, is the same at every size. Heads keep their width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mobilellm.model.network import Network
from mobilellm.recipe.recipe import Recipe

RESIDUAL = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True, kw_only=True)
class TensorFactors:
    """What of a tensor is multiplied."""

    initial: float = 1.0
    """Its first values."""
    learning_rate: float = 1.0

    @property
    def weight_decay(self) -> float:
        """Of its decay: a step takes away the same share at every size."""
        return 1 / self.learning_rate


def transfer_factors(network: Network, recipe: Recipe) -> dict[str, TensorFactors]:
    """Parameter -> its factors; all 1 where the recipe names no transfer."""
    section, config = recipe.transfer, network.config
    width = config.hidden_size / section.base_width if section.kind else 1.0
    applied = config.num_hidden_layers * config.layer_repeats
    depth = applied / section.base_layers if section.kind == "completep" else 1.0
    rate = math.sqrt(width) if recipe.optimizer.name != "adamw" else width
    # Weights that begin at 0.7 / sqrt(columns) follow the width already.
    spread = 1.0 if recipe.model.initial_residual == "zero" else math.sqrt(width)
    found = {}
    for name, parameter in network.named_parameters():
        if name == "norm.weight":
            factors = TensorFactors(initial=1 / width, learning_rate=1 / width)
        elif parameter.ndim == 1 or not name.startswith("layers."):
            factors = TensorFactors()
        else:
            less = depth if name.endswith(RESIDUAL) else 1.0
            factors = TensorFactors(initial=1 / (spread * less), learning_rate=1 / (rate * less))
        found[name] = factors
    return found


@torch.no_grad()
def scale_initial(network: Network, table: Mapping[str, TensorFactors]) -> None:
    """Multiply the first weights, as `initialize` drew them."""
    for name, parameter in network.named_parameters():
        if table[name].initial != 1:
            parameter.mul_(table[name].initial)


def scale_rates(
    optimizers: Sequence[torch.optim.Optimizer],
    network: Network,
    table: Mapping[str, TensorFactors],
) -> None:
    """Divide the groups of optimizers so that each tensor has its learning rate and decay."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            parts: dict[TensorFactors, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                factors = table[names[id(parameter)]]
                key = TensorFactors(learning_rate=factors.learning_rate)
                parts.setdefault(key, []).append(parameter)
            groups += [
                group
                | {
                    "params": params,
                    "lr": group["lr"] * factors.learning_rate,
                    "weight_decay": group["weight_decay"] * factors.weight_decay,
                }
                for factors, params in parts.items()
            ]
        optimizer.param_groups[:] = groups
