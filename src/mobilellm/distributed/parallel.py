"""The network among several processes: compiled, then replicated (DDP) or sharded (FSDP2), in this
order.

    parallel = Parallel(network, recipe, world)
    with parallel.accumulating():               # gradients stay here
        parallel(inputs, targets).backward()
    parallel(inputs, targets).backward()        # gradients are averaged over all processes
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mobilellm.distributed.step_kernels import StepKernels, step_kernels
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.hardware.compiled_code import keep_compiled_code
from mobilellm.kernels.compiling import compile_many_kinds, keep_little
from mobilellm.model.loss import NextToken, Objective
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe


class Step(nn.Module):
    """The share of one micro-batch in the step's loss."""

    def __init__(
        self,
        network: Network,
        precision: Precision,
        objective: Objective,
        kernels: StepKernels,
    ) -> None:
        super().__init__()
        self.network, self.precision, self.objective = network, precision, objective
        self.kernels = kernels

    def forward(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None, *beside: Tensor
    ) -> Tensor:
        """What the objective gives for it: a sum over targets."""
        with self.precision.autocast(inputs.device), self.kernels.used():
            return self.objective(self.network, inputs, targets, documents, *beside)


class Parallel:
    """The loss of a micro-batch, whose gradients end up the same in every process."""

    def __init__(
        self, network: Network, recipe: Recipe, world: World, objective: Objective | None = None
    ) -> None:
        """`objective` is the cross-entropy of the next token when not given."""
        self.network, self.world, self.kind = network, world, recipe.parallel.kind
        objective = objective or NextToken(recipe.optimizer.z_loss)
        self.kernels = kernels = step_kernels(recipe, world.device)
        precision = Precision(recipe.train.precision)
        self.step: nn.Module = Step(network, precision, objective, kernels)
        self.sharded = self.kind == "fsdp" and world.size > 1
        if kernels.compiled:
            keep_compiled_code()
            compile_many_kinds()
            if world.device.type == "cpu":
                keep_little()
            for layer in network.layers:
                layer.compile(dynamic=False)
        if self.sharded:
            _shard(network, world, recipe.parallel.shard_group_size)
        elif world.size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # of a name that only newer versions have
                self.step = nn.parallel.DistributedDataParallel(
                    self.step,
                    device_ids=[world.device] if world.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
            self._settle_buckets()

    def __call__(
        self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None, *beside: Tensor
    ) -> Tensor:
        """Sum of the losses of a micro-batch, times the processes, since gradients are averaged
        over them."""
        loss: Tensor = self.step(inputs, targets, documents, *beside)
        return loss * self.world.size if self.world.size > 1 else loss

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """In this block gradients are kept back: they travel with the next backward pass
        outside."""
        if isinstance(self.step, nn.parallel.DistributedDataParallel):
            with self.step.no_sync():
                yield
        elif self.sharded:
            self.network.set_requires_gradient_sync(False)  # type: ignore[operator]
            try:
                yield
            finally:
                self.network.set_requires_gradient_sync(True)  # type: ignore[operator]
        else:
            yield

    def _settle_buckets(self) -> None:
        """Let DDP rearrange its buckets now, on two tokens: it does so once, after its first
        backward pass.

        Sums over more than two processes depend on where a number stands in its bucket. A resumed
        run would otherwise take its first step with another arrangement than the undisturbed one,
        and differ in the last bit.
        """
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.world.device)
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                self(ids, ids).mul(0.0).backward()
        self.network.zero_grad(set_to_none=True)


def _shard(network: Network, world: World, within: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if within and (world.size % within or within < 2):
        near = [n for n in range(2, world.size + 1) if world.size % n == 0]
        raise UserError(
            f"parallel.shard_group_size = {within} does not divide {world.size} processes",
            hint=f"it can be {', '.join(map(str, near))}",
        )
    if within and within < world.size:  # replicated over the groups, sharded within each
        mesh = init_device_mesh(
            world.device.type, (world.size // within, within), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    for layer in network.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "hidden")
