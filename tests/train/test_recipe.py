"""Recipes: one precedence, unknown keys refused, and what was resolved is a recipe again."""

import warnings
from pathlib import Path

import pytest

from mobilellm.divisors import divisors, largest_divisor, nearest_divisors, nearest_multiples
from mobilellm.errors import UserError
from mobilellm.recipe.earlier_keys import OldKeyWarning
from mobilellm.recipe.recipe import (
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    Recipe,
    StageSection,
    TrainSection,
)
from mobilellm.recipe.settings import ranges


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
        ("train", {"batch_tokens": 1000}, ["does not divide", "the nearest is 768 or 1024"]),
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
    assert [recipe.batching(world).micro_batch_size for world in (1, 2, 5, 30)] == [6, 5, 6, 1]
    assert recipe.replace("train", micro_batch_size=4).batching(2).micro_batch_size == 3
    recipe.check()


@pytest.mark.parametrize(
    ("world", "nearest"),
    [
        (7, ["use 4 or 8 processes, or", "batch_tokens = 57344 or 71680"]),
        (48, ["use 32 processes, or", "batch_tokens = 98304"]),
    ],
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
        recipe.batching(world)
    for words in nearest:
        assert words in str(caught.value)
    assert "98304 or 98304" not in str(caught.value)


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
    assert "stages = [" in (tmp_path / "r.toml").read_text()


def test_shipped_recipes_are_sound() -> None:
    paths = sorted((Path(__file__).resolve().parents[2] / "recipes").rglob("*.toml"))
    assert len(paths) == 25
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # they use the keys of today
            Recipe.read(path).check()


def test_a_shipped_recipe_that_is_broken_is_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nosuch"):
        Recipe.read(write(tmp_path / "r.toml", "[model]\nnosuch = 1")).check()


def test_keys_of_an_earlier_version_are_read_with_a_line(tmp_path: Path) -> None:
    old = """
[model]
layer_repeats = 2
num_hidden_layers = 3
[train]
micro_batch = 2
skip_spikes = 4.0
most_skipped = 7
[optimizer]
kind = "muon"
clip = 0.5
final_fraction = 0.2
[parallel]
shard_within = 8
[[data.stage]]
weights = {a = 1.0}
"""
    with pytest.warns(OldKeyWarning) as told:
        recipe = Recipe.read(write(tmp_path / "r.toml", old))
    assert recipe == Recipe(
        model=ModelSection(override={"layer_repeats": 2, "num_hidden_layers": 3}),
        data=DataSection(stages=(StageSection(weights={"a": 1.0}),)),
        train=TrainSection(micro_batch_size=2, spike_threshold=4.0, max_skipped_in_a_row=7),
        optimizer=OptimizerSection(name="muon", max_grad_norm=0.5, final_lr_fraction=0.2),
        parallel=ParallelSection(shard_group_size=8),
    )
    lines = [str(warning.message) for warning in told]
    assert len(lines) == 10
    assert all("\n" not in line and "r.toml" in line for line in lines)
    assert any("optimizer.clip is called optimizer.max_grad_norm now" in line for line in lines)
    both = write(tmp_path / "both.toml", "[optimizer]\nclip = 1.0\nmax_grad_norm = 2.0")
    with pytest.raises(UserError, match=r"both optimizer\.max_grad_norm and its old name"):
        Recipe.read(both)


@pytest.mark.parametrize("section", [section for section, _ in Recipe().sections()])
def test_every_range_is_held(section: str) -> None:
    for name, allowed in ranges(type(getattr(Recipe(), section))).items():
        low = getattr(allowed, "least", getattr(allowed, "low", getattr(allowed, "limit", None)))
        for bad in (low - 1, float("nan"), getattr(allowed, "high", float("inf")) * 2):
            value = (
                (bad, 0.5) if isinstance(getattr(getattr(Recipe(), section), name), tuple) else bad
            )
            with pytest.raises(UserError, match=rf"{section}\.{name} = "):
                Recipe().replace(section, **{name: value}).check()


def test_divisors_on_either_side() -> None:
    assert nearest_divisors(32, 7) == [4, 8]
    assert nearest_divisors(32, 8) == [8]
    assert nearest_divisors(32, 48) == [32]
    assert nearest_divisors(7, 3) == [1, 7]
    assert nearest_multiples(7, 32) == [28, 35]
    assert nearest_multiples(48, 32) == [48]
    assert [largest_divisor(12, most) for most in (0, 1, 5, 12, 99)] == [1, 1, 4, 12, 12]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
