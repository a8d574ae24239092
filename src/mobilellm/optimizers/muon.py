"""Muon: momentum whose update is orthogonalized, for the matrices inside the blocks.

From Jordan et al. (2024, kellerjordan.github.io/posts/muon), with the update scaled as in Moonlight
(arXiv 2502.16982, section 2.2) so that AdamW's learning rates and weight decay carry over.
torch.optim.Muon walks over the parameters one by one and always iterates in bfloat16, which some
CPUs run hundreds of times slower than float32; here equal shapes go through one batched product in
the precision that the device is fast at, and a matrix stacked from several (Q, K and V, or gate and
up) is orthogonalized part by part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mobilellm.distributed.sharded import local, share, whole

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic Newton-Schulz with the steepest slope at zero (Jordan et al.)
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix (N, rows, columns), rows <= columns, towards 1."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(
        matrices.dtype
    )
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters. A group's `parts` lists the row counts its parameters are stacked
    from."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": None}
        )
        self.dtype = dtype

    found_inf: Tensor | None = None
    """1.0 to skip a step, as torch's fused optimizers have it: on the device, so that the host need
    not know."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; with `found_inf` 1 nothing changes."""
        keep = None if self.found_inf is None else 1 - self.found_inf
        gathered: list[tuple[Tensor, Tensor]] = []
        shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor, float, bool]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                gradient, momentum, weight = (
                    local(parameter.grad),
                    local(state["momentum"]),
                    local(parameter),
                )
                if keep is not None:
                    gradient.masked_fill_(keep == 0, 0.0)  # NaN times 0 would stay NaN
                amount, decay = 1 - group["momentum"], group["lr"] * group["weight_decay"]
                momentum.lerp_(gradient, amount if keep is None else amount * keep)
                direction = gradient.lerp(momentum, group["momentum"])  # Nesterov
                weight.mul_(1 - decay if keep is None else 1 - decay * keep)
                if weight is not parameter:  # orthogonalizing needs whole matrices
                    direction = whole(direction, parameter)
                    weight = torch.zeros_like(direction)
                    gathered.append((parameter, weight))
                parts = group["parts"] or [parameter.shape[0]]
                for part, update in zip(weight.split(parts), direction.split(parts), strict=True):
                    rows, columns = part.shape
                    scale = (
                        -group["lr"] * 0.2 * max(rows, columns) ** 0.5
                    )  # Moonlight: the RMS of AdamW's updates
                    wide = rows <= columns
                    shapes[min(rows, columns), max(rows, columns)].append(
                        (part, update if wide else update.mT, scale, wide)
                    )
        for entries in shapes.values():
            updates = orthogonalize(
                torch.stack([update for _, update, _, _ in entries]).to(self.dtype)
            )
            if keep is not None:
                updates.mul_(keep)
            for (part, _, scale, wide), update in zip(entries, updates, strict=True):
                part.add_(update if wide else update.mT, alpha=scale)
        for parameter, update in gathered:
            local(parameter).add_(share(update, parameter))
