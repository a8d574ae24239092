"""A run with a teacher: what it reports, resuming, and teachers that are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.golden.cases import BASE, make_data
from tests.train.runs import metrics, same

from mobilellm.data.order import derive_key
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.objectives.distillation import Distillation
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.inputs import batches
from mobilellm.train.loop import Trainer
from mobilellm.train.start import resume, train
from mobilellm.workflows.distill import distill


def settings(data: Path, /, **changes: dict) -> Recipe:
    values = {key: dict(value) for key, value in BASE.items()}
    values["data"]["path"] = str(data)
    values["train"] |= {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 0}
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and a teacher trained on them."""
    folder = tmp_path_factory.mktemp("distill")
    data = make_data(folder)
    return data, train(folder / "teacher", settings(data)).run


def test_the_first_loss_is_that_of_the_objective_and_a_resumed_run_has_the_same_bits(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    data, teacher = places
    recipe = settings(
        data,
        model={"override": {"num_hidden_layers": 1}},
        train={"seed": 3},
        distill={"teacher": str(teacher), "weight": 0.7, "temperature": 2.0},
    )
    run = train(tmp_path / "run", recipe).run
    trainer = Trainer(recipe, TokenFolder.open(data))
    batch, _ = next(iter(batches(recipe, trainer.data, trainer.state.data, 0, 1)))
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    objective = Distillation(load(teacher).network, 0.7, 2.0)
    expected = objective(trainer.network, inputs, targets) / targets.numel()
    assert metrics(run)[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    resume(tmp_path / "again")
    step = "checkpoints/step-00000004"
    assert same(tmp_path / "again" / step, run / step)


def test_a_network_learns_to_keep_its_own_distribution_on_the_grid(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    data, teacher = places
    recipe = settings(
        data,
        model={"preset": "", "override": {}},
        start={"from": str(teacher)},
        quantize={"scheme": "int4"},
        distill={"teacher": "start", "weight": 1.0},
    )
    run = train(tmp_path / "run", recipe).run
    losses = [row["loss"] for row in metrics(run)]
    assert 0 < losses[0] < 0.2  # a distance between two networks that are nearly the same


def test_teachers_that_do_not_fit_are_one_line(
    places: tuple[Path, Path], tmp_path: Path, sample_text: str
) -> None:
    data, teacher = places
    (tmp_path / "text.txt").write_text(sample_text[200_000:240_000])
    other = tmp_path / "other"
    prepare([Source("text", [tmp_path / "text.txt"])], other, vocab_size=290, held_out=0.1)
    for recipe, message in (
        (settings(other, distill={"teacher": str(teacher)}), "another tokenizer"),
        (settings(data, distill={"teacher": "start"}), "starts from no model"),
        (settings(data, distill={"teacher": str(tmp_path / "no")}), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", recipe)
        assert not (tmp_path / "run").exists()


def test_a_cache_gives_the_losses_of_its_teacher(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, teacher = places
    vocabulary = TokenFolder.open(data).vocab_size
    for k in (vocabulary, 16):
        distill(teacher, data, tmp_path / f"k{k}", sequence_length=64, top_k=k, precision="fp32")
    section = {"weight": 0.7, "temperature": 1.0}
    small = {"override": {"num_hidden_layers": 1}}
    losses: dict[str, list[float]] = {}
    for name, given in (
        ("online", {"teacher": str(teacher)}),
        ("all", {"cache": str(tmp_path / f"k{vocabulary}")}),
        ("some", {"cache": str(tmp_path / "k16")}),
    ):
        stages = {"stages": [{"weights": {"first": 0.5, "second": 0.5}}]}
        recipe = settings(data, model=small, data=stages, distill=section | given)
        if name == "online":  # where a cache is read samples lie at fixed places
            with monkeypatch.context() as patch:
                patch.setattr("mobilellm.data.loader.derive_key", fixed_phase)
                run = train(tmp_path / name, recipe).run
        else:
            run = train(tmp_path / name, recipe).run
        losses[name] = [row["loss"] for row in metrics(run)]
    assert losses["all"] == pytest.approx(losses["online"], abs=1e-3)
    assert losses["some"] != losses["all"]
    assert all(s < a + 1e-3 for s, a in zip(losses["some"][:1], losses["all"][:1], strict=True))
    shutil.copytree(tmp_path / "some", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    resume(tmp_path / "again")
    step = "checkpoints/step-00000004"
    assert same(tmp_path / "again" / step, tmp_path / "some" / step)
    cache = {"cache": str(tmp_path / "k16")}
    short = settings(data, data={"sequence_length": 32}, distill=cache)
    both = settings(data, distill=cache | {"teacher": str(teacher)})
    for recipe, message in (
        (short, "made for sequence length 64, not 32"),
        (both, "two teachers"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "other", recipe)


def fixed_phase(*parts: int | str) -> int:
    """The loader's keys, but for where an epoch's samples begin."""
    return 0 if parts[-1] == "phase" else derive_key(*parts)
