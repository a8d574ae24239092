"""Which steps are not taken: decided on the device, so that no step waits for the host.

skip = guard.check(loss, norm)      # 0-dim bool tensor on the device
"""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 0.02  # weight of the newest step in the running mean and variance: about the last 50 steps
FIRST = 50  # steps before which the statistics are too young to be trusted with a spike
# Until then only the loss is judged, as if its standard deviation were at least this share of its
# mean: the loss of a network that knows nothing is the logarithm of the vocabulary, and a training
# that works never goes far above it.
EARLY_SHARE = 0.1


class Guard:
    """Running mean and variance of loss and gradient norm, and the steps they rule out.

    `state` (5,) float64: steps taken, mean and variance of the loss, mean and variance of the norm.
    It is part of the training state: a resumed run decides as the undisturbed one.
    """

    def __init__(self, device: torch.device, deviations: float) -> None:
        """`deviations` 0 rules out only what is not finite."""
        self.deviations = deviations
        self.state = torch.zeros(5, dtype=torch.float64, device=device)

    @torch.no_grad()
    def check(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step with this loss and gradient norm is to be skipped; one that is taken
        enters the statistics."""
        values = torch.stack((loss, norm)).double()
        skip = ~torch.isfinite(values).all()
        count, means, variances = self.state[0], self.state[[1, 3]], self.state[[2, 4]]
        if self.deviations:
            spread = variances.sqrt()
            above = (values > means + self.deviations * spread).any()
            early = torch.maximum(spread[0], EARLY_SHARE * means[0])
            exploded = (count > 0) & (values[0] > means[0] + self.deviations * early)
            skip = skip | torch.where(count >= FIRST, above, exploded)
        weight = torch.clamp(1 / (count + 1), min=MEMORY)  # a plain mean at first
        distance = values - means
        new_means = means + weight * distance
        new_variances = (1 - weight) * (variances + weight * distance.square())
        new = torch.stack(
            (count + 1, new_means[0], new_variances[0], new_means[1], new_variances[1])
        )
        self.state = torch.where(skip, self.state, new)
        return skip
