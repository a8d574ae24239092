"""Recipes: one precedence, unknown keys refused, and what was resolved is a recipe again."""

from pathlib import Path

import pytest

from mobilellm.errors import UserError
from mobilellm.train.recipe import DataSection, OptimizerSection, Recipe, StageSection, TrainSection


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(
        data=DataSection(path="a b/ü"),
        optimizer=OptimizerSection(betas=(0.8, 0.99), learning_rate=1e-3),
    )
    recipe.write(tmp_path / "recipe.toml")
    assert Recipe.read(tmp_path / "recipe.toml") == recipe


def test_file_overrides_defaults_and_flags_override_the_file(tmp_path: Path) -> None:
    import tyro

    from mobilellm.cli.train import Train, from_recipe

    path = write(
        tmp_path / "r.toml", "[train]\nsteps = 7\nseed = 3\n[optimizer]\nlearning_rate = 1\n"
    )
    arguments = [str(path), "--train.steps", "9"]
    parsed = tyro.cli(Train, default=from_recipe(arguments), args=arguments)
    assert (parsed.train.steps, parsed.train.seed, parsed.train.batch_tokens) == (
        9,
        3,
        TrainSection().batch_tokens,
    )
    assert parsed.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nstep = 5", ["train.step", "did you mean 'train.steps'"]),
        ("[optimiser]\nname = 'adamw'", ["optimiser", "did you mean 'optimizer'"]),
        ("[train]\nsteps = 'five'", ["train.steps", "int"]),
        ("[train]\nsteps = true", ["train.steps", "int"]),
        ("[train]\nprecision = 'fp8'", ["fp8", "fp32"]),
        ("[optimizer]\nbetas = [0.9]", ["optimizer.betas", "2 numbers"]),
        ("train = 5", ["[train] must be a table"]),
        ("[train", ["broken TOML"]),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.read(write(tmp_path / "r.toml", text))
    assert "\n" not in str(caught.value)
    for word in ["r.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("train", {"batch_tokens": 1000}, ["does not divide", "the nearest is 1024"]),
        ("train", {"spike_threshold": float("inf")}, ["train.spike_threshold"]),
        ("data", {"stages": (StageSection(),)}, ["data.stages 1: no weights"]),
        ("data", {"stages": (StageSection(weights={"a": -1.0}),)}, ["weight -1.0 of 'a'"]),
        (
            "data",
            {"stages": (StageSection(weights={"a": 1.0}), StageSection(weights={"a": 1.0}))},
            ["data.stages 1: until_tokens"],
        ),
        ("optimizer", {"decay_steps": 2000}, ["decay_steps = 2000 exceeds train.steps = 1000"]),
        ("train", {"steps": 0}, ["train.steps = 0"]),
        ("train", {"seed": -1}, ["train.seed"]),
        ("optimizer", {"learning_rate": float("nan")}, ["learning_rate"]),
        ("optimizer", {"final_lr_fraction": 2.0}, ["final_lr_fraction", "from 0 to 1"]),
        ("data", {"sequence_length": 0}, ["sequence_length = 0"]),
    ],
)
def test_values_that_cannot_work_are_one_line(
    section: str, changes: dict, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        Recipe().replace(section, **changes).check()
    for word in words:
        assert word in str(caught.value)


def test_micro_batch_divides_the_batch() -> None:
    recipe = Recipe(
        data=DataSection(sequence_length=2048), train=TrainSection(batch_tokens=2048 * 30)
    )
    assert [recipe.micro_batch_size(world) for world in (1, 2, 5, 30)] == [6, 5, 6, 1]
    assert recipe.replace("train", micro_batch_size=4).micro_batch_size(2) == 3
    recipe.check()


@pytest.mark.parametrize(
    ("world", "nearest"), [(7, ["6 or 8", "57344 or 65536"]), (48, ["16 or 32", "98304"])]
)
def test_a_world_that_does_not_divide_the_batch_is_told_the_nearest(
    world: int, nearest: list[str]
) -> None:
    recipe = Recipe(
        data=DataSection(sequence_length=2048), train=TrainSection(batch_tokens=2048 * 32)
    )
    with pytest.raises(
        UserError, match=f"32 sequences .* do not divide by {world} processes"
    ) as caught:
        recipe.rows(world)
    print(caught.value)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_the_learning_rate_follows_the_batch(rule: str, factor: float) -> None:
    recipe = Recipe().replace(
        "optimizer", learning_rate=5e-4, reference_batch_tokens=2048, batch_scaling=rule
    )
    assert recipe.learning_rate_factor == factor


def test_stages_survive_the_file(tmp_path: Path) -> None:
    stages = (
        StageSection(weights={"a": 1.0, "b": 0.5}, until_tokens=100),
        StageSection(weights={"b": 1.0}),
    )
    recipe = Recipe(data=DataSection(stages=stages))
    recipe.check()
    recipe.write(tmp_path / "r.toml")
    assert Recipe.read(tmp_path / "r.toml") == recipe
    assert (
        "[[data.stages]]" in (tmp_path / "r.toml").read_text()
        or "stage = [" in (tmp_path / "r.toml").read_text()
    )


def test_shipped_recipes_are_sound() -> None:
    for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"):
        Recipe.read(path).check()
