"""An average of weights: what it is, that it is what others load, and that it is resumed."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from tests.golden.cases import BASE, make_data
from tests.train.runs import metrics, same, weights

from mobilellm.data.token_folder import TokenFolder
from mobilellm.evaluate.held_out import held_out
from mobilellm.interop.load import load
from mobilellm.model.weights import to_named
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.inputs import open_data
from mobilellm.train.loop import Trainer
from mobilellm.train.rows import Watcher
from mobilellm.train.start import resume, train

STEPS = 6


class Kept(Watcher):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.trainer: Trainer | None = None

    def started(self, trainer: Trainer, done: int) -> None:
        update = trainer.step.update

        def kept(step: int, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            result = update(step, loss)
            network = trainer.network
            named = to_named(network.config, dict(network.named_parameters()))
            self.weights.append({name: tensor.clone() for name, tensor in named.items()})
            return result

        trainer.step.update = kept


def settings(data: Path, **average: object) -> Recipe:
    values = {key: dict(value) for key, value in BASE.items()}
    values["data"]["path"] = str(data)
    values["train"] |= {"steps": STEPS, "checkpoint_every": 3, "keep_checkpoints": 0}
    values["average"] = average
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("average"))


def test_a_tail_is_the_mean_of_the_weights_from_a_step_on(data: Path, tmp_path: Path) -> None:
    kept, recipe = Kept(), settings(data, kind="tail", start=2)
    outcome = train(tmp_path / "run", recipe, kept)
    found = weights(outcome.checkpoint)
    for name, tensor in found.items():
        mean = torch.stack([step[name] for step in kept.weights[2:]]).mean(0)
        assert (tensor - mean).abs().max() < 1e-6, name
    # What the run reports is the loss of these weights.
    score = held_out(load(outcome.run).network, TokenFolder.open(data), sequence_length=64)
    assert metrics(outcome.run)[-1]["held_out_loss"] == pytest.approx(score.loss, rel=1e-6)


def test_an_ema_forgets_at_its_rate_and_faster_at_first(data: Path, tmp_path: Path) -> None:
    kept = Kept()
    outcome = train(tmp_path / "run", settings(data, kind="ema", decay=0.3), kept)
    average = {name: tensor.clone() for name, tensor in kept.weights[0].items()}
    for taken, step in enumerate(kept.weights[1:], 1):
        decay = min(0.3, (1 + taken) / (10 + taken))
        average = {name: decay * average[name] + (1 - decay) * step[name] for name in step}
    for name, tensor in weights(outcome.checkpoint).items():
        assert (tensor - average[name]).abs().max() < 1e-6, name


@pytest.mark.parametrize("average", [{"kind": "ema", "decay": 0.9}, {"kind": "tail", "start": 4}])
def test_a_resumed_run_ends_with_the_same_bits(
    data: Path, tmp_path: Path, average: dict[str, object]
) -> None:
    run = train(tmp_path / "run", settings(data, **average)).run
    shutil.copytree(run, tmp_path / "again")
    step = f"checkpoints/step-{STEPS:08d}"
    shutil.rmtree(tmp_path / "again" / step)
    resume(tmp_path / "again")
    assert same(tmp_path / "again" / step, run / step)


def test_the_training_itself_is_left_as_it_is(data: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", settings(data)).run
    averaged = train(tmp_path / "averaged", settings(data, kind="ema")).run
    losses = [[row["loss"] for row in metrics(run)] for run in (plain, averaged)]
    assert losses[0] == losses[1]
    assert metrics(plain)[-1]["held_out_loss"] != metrics(averaged)[-1]["held_out_loss"]


def test_the_network_has_its_own_weights_again_after_a_fault(data: Path) -> None:
    recipe = settings(data, kind="ema")
    trainer = Trainer(recipe, open_data(recipe))
    assert trainer.average is not None
    trainer.average.update(1)
    with torch.no_grad():
        trainer.network.norm.weight.add_(1)
    with contextlib.suppress(RuntimeError), trainer.averaged():
        assert float(trainer.network.norm.weight[0].detach()) == 1
        raise RuntimeError("in the middle of an evaluation")
    assert float(trainer.network.norm.weight[0].detach()) == 2
