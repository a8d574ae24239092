"""Every "auto" of a recipe, decided for one device before the run begins and written down with
it."""

from __future__ import annotations

import torch

from mobilellm.hardware.probes import compiler_works
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe

WORTH_COMPILING_STEPS = 200  # compiling the block costs 10 to 30 s once


def resolve(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` with every "auto" decided for this device."""
    if recipe.train.precision == "auto":
        recipe = recipe.replace("train", precision=Precision.fast_on(device).value)
    if recipe.train.compile == "auto":
        worth = recipe.train.steps >= WORTH_COMPILING_STEPS
        recipe = recipe.replace("train", compile="block" if worth and compiler_works() else "off")
    return recipe
