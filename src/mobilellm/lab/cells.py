"""The cells of a lab: each a recipe of its own, solved so that what is held equal is equal.

    cells = solved_cells(lab, data)
    cells[0].config.hidden_size, cells[0].parameters

A cell's shape is written into its recipe whole, so that its run folder is an ordinary one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.data.dataset import Data
from mobilellm.errors import UserError, located
from mobilellm.lab.lab_file import LabFile, merged, nested
from mobilellm.lab.shapes import TOLERANCE, Measure, parameters_of, shaped, solve
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.inputs import model_config

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
MAX_SLUG = 40
Costs = Callable[["Cell"], tuple[float, float]]
"""What a token of a cell costs, and what each step costs beside its tokens."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row of the table: one recipe, to be trained with several seeds."""

    name: str
    slug: str
    """The beginning of its runs' names."""
    recipe: Recipe
    """With seed 0."""
    config: ModelConfig

    @property
    def parameters(self) -> int:
        """Stored parameters."""
        return ModelCosts.of(self.config).parameters["total"]

    @property
    def flops_per_token(self) -> int:
        """Of the training, attention's among them as PaLM counts them."""
        length = self.recipe.data.sequence_length
        return ModelCosts.of(self.config).flops_per_token(length)["palm"]

    def with_steps(self, steps: int) -> Cell:
        """The cell trained for so many steps."""
        return dataclasses.replace(self, recipe=self.recipe.replace("train", steps=steps))

    def facts(self) -> dict[str, Any]:
        """What tables and pages say of it."""
        config, costs = self.config, ModelCosts.of(self.config)
        return {
            "layers": config.num_hidden_layers,
            "executed_layers": costs.executed_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "parameters": costs.parameters["total"],
            "tokens": self.recipe.tokens(),
            "flops": self.flops_per_token * self.recipe.tokens(),
        }


def slug_of(number: int, name: str) -> str:
    """A name for folders: "03-deep-and-thin"."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:MAX_SLUG].strip("-.")
    return f"{number:02}-{plain}" if plain else f"{number:02}"


def cell_recipe(lab: LabFile, settings: Mapping[str, Any], data: Path, where: str) -> Recipe:
    """The recipe of a cell before its shape is solved."""
    values = lab.recipe
    for key, value in settings.items():
        values = merged(values, nested(key, value))
    values = merged(values, {"data": {"path": str(data.resolve())}})
    recipe = Recipe.from_dict(values, where)
    if not lab.gives("train.keep_checkpoints"):
        recipe = recipe.replace("train", keep_checkpoints=1)
    recipe.check()
    return recipe


def solved_cells(lab: LabFile, data: Data, measure: Measure = parameters_of) -> list[Cell]:
    """All cells. `measure` is what is held equal by the shape; what is held by the number of steps
    is not yet (see `held_by_steps`).

    `UserError`, with the cell's name, for one that no network can have or that cannot be held
    equal.
    """
    entries = lab.cell_settings()
    names = [name for name, _ in entries]
    order = [lab.base_name, *(name for name in names if name != lab.base_name)]
    by_name: dict[str, Cell] = {}
    target: float | None = None
    for name in order:  # the one that the others are held equal to comes first
        where = f"cell {name!r}"
        number = names.index(name)
        recipe = cell_recipe(lab, entries[number][1], data.path, where)
        with located(where):
            recipe, config = _shaped(lab, recipe, data, target, measure)
        if target is None and lab.equal in ("parameters", "latency"):
            target = measure(config)
        by_name[name] = Cell(
            name=name, slug=slug_of(number + 1, name), recipe=recipe, config=config
        )
    return [by_name[name] for name in names]


def _shaped(
    lab: LabFile, recipe: Recipe, data: Data, target: float | None, measure: Measure
) -> tuple[Recipe, ModelConfig]:
    """A cell's recipe with its whole shape, and the network's configuration."""
    if lab.shape is None or recipe.start.from_:
        return recipe, _config(recipe, data)
    config = _config(recipe, data)
    if target is None:
        config = shaped(config, config.hidden_size, lab.shape)
    else:
        config = solve(config, lab.free, target, measure, lab.shape)
    override = recipe.model.override | {key: getattr(config, key) for key in SHAPE_KEYS}
    return recipe.replace("model", override=override), config


def _config(recipe: Recipe, data: Data) -> ModelConfig:
    """The network's configuration; that of given weights is theirs."""
    if not recipe.start.from_:
        return model_config(recipe, data)
    from mobilellm.train.origin import read_origin

    return model_config(recipe, data, read_origin(Path(recipe.start.from_), data).weights.config)


def held_by_steps(lab: LabFile, cells: list[Cell], cost: Costs) -> list[Cell]:
    """The cells with as many steps as hold the cost of the whole training to that of the cell that
    the others are compared with."""

    def whole(cell: Cell) -> float:
        token, step = cost(cell)
        return token * cell.recipe.tokens() + step * cell.recipe.train.steps

    target, found = whole(next(cell for cell in cells if cell.name == lab.base_name)), []
    for cell in cells:
        token, step = cost(cell)
        steps = max(1, cell.recipe.steps_of(target / token, step / token))
        made = cell.with_steps(steps)
        off = whole(made) / target - 1
        if abs(off) > TOLERANCE:
            raise UserError(
                f"cell {cell.name!r}: {steps} steps are off by {off:+.1%} in {lab.equal} (more "
                f"than {TOLERANCE:.0%})",
                hint="train for more steps",
            )
        found.append(made)
    return found
