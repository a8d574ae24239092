"""AdamW whose weight decay is cautious (arXiv 2510.12402): a weight shrinks only where the update
does not make it larger.

    optimizer = CautiousAdamW(groups, lr=2e-3, weight_decay=0.1, fused=True)

Decay then never works against what the gradients ask for, and a larger one can be taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobilellm.distributed.sharded import local


class CautiousAdamW(torch.optim.AdamW):
    """torch's AdamW, but that of each tensor only the numbers decay whose sign is that of the first
    moment, which is what the update is subtracted by."""

    found_inf: Tensor | None = None
    """1.0 to skip a step, as torch's fused optimizers have it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients; with `found_inf` 1 nothing changes."""
        keep = 1.0 if self.found_inf is None else 1 - self.found_inf
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for parameter in group["params"] if decay else ():
                if parameter.grad is None:
                    continue
                weight, moment = local(parameter), local(parameter.grad)
                if state := self.state.get(parameter):
                    moment = moment.lerp(local(state["exp_avg"]), group["betas"][0])
                weight.mul_(1 - group["lr"] * decay * keep * (moment * weight > 0))
            group["weight_decay"] = 0.0  # torch's own
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
