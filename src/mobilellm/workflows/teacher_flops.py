"""What a run's teacher took, beside its own training: so runs compare at equal FLOPs.

training |= teacher_flops(recipe, outcome.tokens)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.interop.load import describe
from mobilellm.model.costs import ModelCosts
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.objective import START

FORWARD = 2
"""FLOPs of a forward pass, a parameter and token; training takes three times as many."""


def teacher_flops(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """`teacher_flops` of result.json's training: of the samples that the run saw; of a cache, of
    all data once, however many runs read it. Empty without a teacher, or where it is gone."""
    section = recipe.distill
    try:
        if section.cache:
            facts = read_json(Path(section.cache) / "manifest.json")["facts"]
            return {"teacher_flops": FORWARD * facts["teacher_parameters"] * facts["tokens"]}
        if section.teacher:
            path = recipe.start.from_ if section.teacher == START else section.teacher
            parameters = ModelCosts.of(describe(Path(path))[0]).parameters["total"]
            return {"teacher_flops": FORWARD * parameters * tokens}
    except (UserError, KeyError, TypeError):
        return {}
    return {}
