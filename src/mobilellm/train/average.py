"""An average of the weights, kept beside the run: what is evaluated and exported.

    average = Average(network, recipe.average)
    average.update(step)                # after every optimizer step
    with average.applied():             # the network has the averaged weights in this block
        score = evaluation.held_out()

An exponential moving average (Polyak and Juditsky, 1992, with a decay) forgets old weights at a
fixed rate, and at first faster, so that it is not made of first weights; a tail average gives all
weights from a step on equal shares. The average is of float32 weights and has their shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mobilellm.distributed.sharded import local
from mobilellm.model.network import Network
from mobilellm.recipe.tuning import AverageSection


class Average:
    """The averaged weights of one run; nothing is held before its first step."""

    def __init__(self, network: Network, section: AverageSection) -> None:
        self.network, self.section = network, section
        self.count = 0
        """Steps whose weights it is made of."""
        self._weights: list[Tensor] = []

    def _own(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self.network.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights, as they are after `step` optimizer steps."""
        if step <= self.section.start:
            return
        if not self.count:
            self._weights = [weight.clone() for weight in self._own()]
        else:
            torch._foreach_lerp_(self._weights, self._own(), self._share())
        self.count += 1

    def _share(self) -> float:
        """The newest weights' share of the average."""
        if self.section.kind == "tail":
            return 1 / (self.count + 1)
        # As in TensorFlow's ExponentialMovingAverage: the first averages are short ones.
        return 1 - min(self.section.decay, (1 + self.count) / (10 + self.count))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights in this block, and its own again afterwards."""
        if not self.count:
            yield
            return
        own = [weight.clone() for weight in self._own()]
        torch._foreach_copy_(self._own(), self._weights)
        try:
            yield
        finally:
            torch._foreach_copy_(self._own(), own)

    def restore(self, count: int) -> None:
        """Take the network's weights for an average of `count` steps, as a checkpoint has them."""
        self.count = count
        self._weights = [weight.clone() for weight in self._own()] if count else []
