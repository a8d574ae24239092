"""One optimizer step: gradients over micro-batches, clipping, the guard's decision, the update.

step = TrainStep(network, recipe, world)
loss = step.forward_backward(inputs, targets)     # mean nats over the targets of all processes
norm, skipped = step.update(0, loss)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mobilellm.distributed.parallel import Parallel
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.hardware.device_memory import empty_cache, is_out_of_memory
from mobilellm.model.loss import IGNORED, Objective
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.objectives.own_mean import OwnMean
from mobilellm.optimizers.guard import Guard
from mobilellm.optimizers.optimizer import build, clip_gradients, set_learning_rate, skip_when
from mobilellm.optimizers.schedule import factor
from mobilellm.optimizers.transfer import transfer_factors
from mobilellm.plan.batching import Batching
from mobilellm.recipe.recipe import Recipe

MAX_TRIED_TOKENS = 1 << 17  # of the first micro-batch that is tried on a GPU


class TrainStep:
    """The network of a run, wrapped for its processes, with its optimizers and its guard."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        world: World,
        masked: bool = False,
        say: Callable[[str], None] = lambda _: None,
        objective: Objective | None = None,
    ) -> None:
        """`objective` is the cross-entropy of the next token when not given. `masked` says that
        some targets do not count, so that they must be counted anew each step."""
        self.network, self.recipe, self.world = network, recipe, world
        self.masked, self.say = masked, say
        given: Any = objective
        self.own_mean: OwnMean | None = given if isinstance(given, OwnMean) else None
        self.figures: dict[str, Tensor] = {}
        """What the objective says of the last step, beside its loss."""
        self.batching = recipe.batching(world.size)
        if world.device.type == "cuda" and not recipe.train.micro_batch_size:
            self.batching = find_micro_batch(network, recipe, world, objective)
        self.parallel = Parallel(network, recipe, world, objective)
        self.optimizers = build(
            network,
            recipe.optimizer,
            Precision(recipe.train.precision),
            recipe.learning_rate_factor,
            transfer_factors(network, recipe),
            tiles=self.parallel.kernels.amx,
        )
        self.guard = Guard(world.device, recipe.train.spike_threshold)

    def forward_backward(
        self,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """Gradients of the mean loss over the targets of all processes; returns that loss.

        inputs, targets (and documents) are this process's rows, each (rows, T), and so is what lies
        beside them. When memory runs out in a single process the micro-batch is halved; `UserError`
        when it cannot be.
        """
        while True:
            try:
                return self._accumulate(inputs, targets, documents, beside)
            except RuntimeError as error:
                smallest = self.batching.micro_batch_size == 1
                if not is_out_of_memory(error) or self.world.size > 1 or smallest:
                    raise _out_of_memory(error, self.batching) from error
            self.network.zero_grad(set_to_none=True)
            self.batching = self.batching.with_micro_batch(self.batching.micro_batch_size // 2)
            empty_cache(self.world.device)
            size = self.batching.micro_batch_size
            self.say(f"out of memory: the micro-batch is {size} sequences from now on")

    def _accumulate(
        self,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None,
        beside: tuple[Tensor, ...],
    ) -> Tensor:
        rows, counted = self.batching.micro_batch_size, self._counted(targets, documents)
        if self.own_mean is not None:
            self.own_mean.figures()  # those of an attempt that ran out of memory
        none = [None] * -(-len(inputs) // rows)
        pieces = list(
            zip(
                inputs.split(rows),
                targets.split(rows),
                none if documents is None else documents.split(rows),
                *(part.split(rows) for part in beside),
                strict=True,
            )
        )
        total = torch.zeros((), device=self.world.device)
        for number, (x, y, d, *more) in enumerate(pieces, 1):
            last = number == len(pieces)
            with contextlib.nullcontext() if last else self.parallel.accumulating():
                loss = self.parallel(x, y, d, *more) / counted
                loss.backward()
            total += loss.detach()
        if self.own_mean is not None:
            sums = self.own_mean.figures()
            self.figures = {name: self.world.sum_(sums[name] / counted) for name in sums}
        return self.world.sum_(total / self.world.size)

    def _counted(self, targets: Tensor, documents: Tensor | None) -> int | Tensor:
        """Targets of all processes that count, or what else the objective's mean is over: processes
        may hold different numbers of them. It stays on the device."""
        if self.own_mean is not None:
            return self.world.sum_(self.own_mean.counted(targets, documents)).clamp(min=1)
        if not self.masked:
            return targets.numel() * self.world.size
        return self.world.sum_((targets != IGNORED).sum()).clamp(min=1)

    def update(self, step: int, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step every optimizer at the learning rate of `step`, unless the guard rules the
        step out; drop the gradients. Returns the gradient norm before clipping, and whether the
        step was skipped."""
        section = self.recipe.optimizer
        limit = section.max_grad_norm or math.inf
        norm = clip_gradients(list(self.network.parameters()), limit)
        skip = self.guard.check(loss, norm)
        skip_when(self.optimizers, skip)
        rate = factor(step, self.recipe.train.steps, section)
        follows = section.weight_decay_schedule == "learning_rate"
        set_learning_rate(self.optimizers, rate, rate if follows else 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm, skip

    def learning_rate(self, step: int) -> float:
        """The learning rate of the matrices inside the blocks at `step`."""
        section = self.recipe.optimizer
        peak = section.learning_rate * self.recipe.learning_rate_factor
        return peak * factor(step, self.recipe.train.steps, section)


def find_micro_batch(
    network: Network, recipe: Recipe, world: World, objective: Objective | None = None
) -> Batching:
    """The division with the largest micro-batch whose forward and backward pass fit into the
    device's memory, found by trying. Room is kept for gradients and moments. `UserError` when one
    sequence does not fit."""
    batching = recipe.batching(world.size)
    length = batching.sequence_length
    batching = batching.with_micro_batch(max(1, MAX_TRIED_TOKENS // length))
    step = Parallel(network, recipe, World(device=world.device), objective)
    reserve = 3 * sum(p.numel() * p.element_size() for p in network.parameters())
    while True:
        size = batching.micro_batch_size
        ids = torch.zeros(size, length, dtype=torch.long, device=world.device)
        held: Tensor | None = None
        try:
            held = torch.empty(reserve, dtype=torch.uint8, device=world.device)
            step(ids, ids).backward()
            fits = True
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise _out_of_memory(error, batching) from error
            fits = False
        network.zero_grad(set_to_none=True)
        del held
        empty_cache(world.device)
        if fits:
            return batching.with_micro_batch(world.smallest(size))
        batching = batching.with_micro_batch(size // 2)


def _out_of_memory(error: RuntimeError, batching: Batching) -> Exception:
    if not is_out_of_memory(error):
        return error
    return UserError(
        f"out of memory with a micro-batch of {batching.micro_batch_size} x "
        f"{batching.sequence_length} tokens",
        hint=(
            "lower train.micro_batch_size, use parallel.kind fsdp, or ask `mobilellm plan` what "
            "fits"
        ),
    )
