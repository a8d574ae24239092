"""Every "auto" of a recipe, decided for one device before the run begins and written down with
it."""

from __future__ import annotations

import torch

from mobilellm.hardware.probes import compiler_works
from mobilellm.kernels.flash import fault
from mobilellm.kernels.products import Products, fastest_products, products_fault
from mobilellm.model.config import ModelConfig
from mobilellm.model.linear import block_products
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe

WORTH_COMPILING_STEPS = 200  # compiling the block costs 10 to 30 s once


def resolve(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` with every "auto" decided for this device."""
    if recipe.train.precision == "auto":
        recipe = recipe.replace("train", precision=Precision.fast_on(device).value)
    if recipe.train.compile == "auto":
        worth = recipe.train.steps >= WORTH_COMPILING_STEPS
        works = worth and compiler_works(device)
        recipe = recipe.replace("train", compile="block" if works else "off")
    if recipe.train.attention == "auto":
        compiled = recipe.train.compile == "block" and device.type == "cpu"
        tiles = compiled and not fault(Precision(recipe.train.precision).dtype)
        recipe = recipe.replace("train", attention="tiles" if tiles else "torch")
    return recipe


def resolve_for(recipe: Recipe, config: ModelConfig, device: torch.device) -> Recipe:
    """`resolve`, and the products of one process that trains this network: what a run of the recipe
    begins with."""
    recipe = resolve(recipe, device)
    return recipe.replace("train", products=resolve_products(recipe, config, device, 1))


def resolve_products(
    recipe: Recipe, config: ModelConfig, device: torch.device, processes: int
) -> Products:
    """What computes `recipe`'s products where it is "auto": in float32 measured at the shapes of
    `config`, in bfloat16 AMX where there is that."""
    if recipe.train.products != "auto":
        return recipe.train.products
    if device.type != "cpu":
        return "torch"
    if recipe.train.precision == Precision.BF16.value:
        return "torch" if products_fault("amx") else "amx"
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    batching = recipe.batching(processes)
    rows = batching.micro_batch_size * batching.sequence_length
    return fastest_products(block_products(config, rows))
