"""What computes a step, as a resolved recipe has it, on a machine that has it too.

    kernels = step_kernels(recipe, device)
    with kernels.used():
        loss = network.loss(inputs, targets)

Whoever trains or measures a step asks here, and so does a lab before it begins a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mobilellm.errors import UserError
from mobilellm.hardware.probes import compiler_works
from mobilellm.kernels import gpu
from mobilellm.kernels.compiling import compiled_steps
from mobilellm.kernels.flash import fault, using_tiles
from mobilellm.kernels.products import OF_FLOAT32, Products, products_fault, using
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StepKernels:
    """What computes a step."""

    products: Products
    """Of matrices; in float32 never "amx", in bfloat16 that or "torch"."""
    tiles: bool
    """Whether attention is computed in tiles."""
    compiled: bool
    """Whether the blocks are compiled."""

    @property
    def amx(self) -> bool:
        """Whether Muon's step is AMX's too."""
        return self.products == "amx"

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """In this block they are what computes."""
        with using(self.products), compiled_steps(self.compiled), using_tiles(self.tiles):
            yield


def step_kernels(recipe: Recipe, device: torch.device) -> StepKernels:
    """What the recipe has computed by what on a device. Products and tiles are the CPU's; "auto" is
    torch's own, in a recipe that was never resolved.

    `UserError` where this machine cannot.
    """
    train, on_cpu = recipe.train, device.type == "cpu"
    gpu.load(device)
    compiled = train.compile == "block"
    if compiled and not compiler_works(device):
        raise UserError(
            'train.compile = "block": no compiler works here',
            hint="--train.compile off computes the same but for the last digits",
        )
    tiles = on_cpu and train.attention == "tiles"
    if tiles and (reason := fault(Precision(train.precision).dtype)):
        raise UserError(
            f'train.attention = "tiles": {reason}',
            hint="--train.attention torch computes the same but for the last digits",
        )
    bf16 = train.precision == Precision.BF16.value
    kinds: tuple[Products, ...] = ("amx",) if bf16 else OF_FLOAT32
    named = [kind for kind in kinds if on_cpu and kind == train.products]
    products: Products = named[0] if named else "torch"
    if reason := products_fault(products):
        raise UserError(
            f'train.products = "{products}": {reason}',
            hint="--train.products torch computes the same but for the last digits",
        )
    return StepKernels(products=products, tiles=tiles, compiled=compiled)
