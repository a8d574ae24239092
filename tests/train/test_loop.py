"""Whole small runs: they learn, end, resume to the bit, and stop when they must."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mobilellm.errors import UserError
from mobilellm.train import checkpoint, loop
from mobilellm.train.loop import Watcher, resume, train
from mobilellm.train.recipe import DataSection, ModelSection, OptimizerSection, Recipe, TrainSection


@pytest.fixture
def recipe(small_data: Path) -> Recipe:
    return Recipe(
        model=ModelSection(preset="1M", num_hidden_layers=2),
        data=DataSection(path=str(small_data), sequence_length=32),
        train=TrainSection(
            steps=24, batch_tokens=128, precision="fp32", compile="off", evaluate_every=8, checkpoint_every=5, log_every=3
        ),
        optimizer=OptimizerSection(warmup_steps=4, learning_rate=3e-3),
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a: Path, b: Path) -> bool:
    """Weights, optimiser and state, bit for bit."""
    names = ["model.safetensors", "train_state/optimizer.safetensors", "train_state/state.json"]
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


class StopAt(Watcher):
    """Sends this process a signal when a step is recorded."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def stepped(self, row: dict) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)


def test_a_run_documents_itself(recipe: Recipe, tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", recipe)
    assert (outcome.step, outcome.interrupted) == (24, None)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(rows[0])
    assert [row["step"] for row in rows if "held_out_loss" in row] == [8, 16, 24]
    assert rows[-1]["tokens"] == 24 * 128
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert Recipe.read(tmp_path / "run/recipe.toml") == recipe.replace("data", path=str(Path(recipe.data.path).resolve()))
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert {"torch", "device", "commit", "data_fingerprint", "precision"} <= set(environment)
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == ["step-00000015", "step-00000020", "step-00000024"]


def test_one_seed_is_one_run_and_another_is_another(recipe: Recipe, tmp_path: Path) -> None:
    a, b = train(tmp_path / "a", recipe), train(tmp_path / "b", recipe)
    assert same(a.checkpoint, b.checkpoint)
    c = train(tmp_path / "c", recipe.replace("train", seed=1))
    assert not same(a.checkpoint, c.checkpoint)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stop", [1, 7, 23])
def test_interrupted_and_resumed_equals_undisturbed(recipe: Recipe, tmp_path: Path, kind: str, stop: int) -> None:
    recipe = recipe.replace("optimizer", kind=kind).replace("train", log_every=1)
    whole = train(tmp_path / "whole", recipe)
    first = train(tmp_path / "run", recipe, StopAt(stop))
    assert (first.step, first.interrupted) == (stop, "SIGINT")
    second = resume(tmp_path / "run")
    assert second.step == 24
    assert same(whole.checkpoint, second.checkpoint)
    keys = ("step", "loss", "grad_norm", "tokens", "learning_rate", "held_out_loss")
    assert [[r.get(k) for k in keys] for r in metrics(tmp_path / "whole")] == [
        [r.get(k) for k in keys] for r in metrics(tmp_path / "run")
    ]


@pytest.mark.long
def test_killed_at_arbitrary_steps_and_resumed_equals_undisturbed(recipe: Recipe, tmp_path: Path) -> None:
    """SIGKILL, five times, wherever it hits: between steps, while evaluating, while writing a checkpoint."""
    recipe = recipe.replace("train", steps=300, checkpoint_every=7, evaluate_every=10, log_every=1)
    whole = train(tmp_path / "whole", recipe)
    recipe.write(tmp_path / "recipe.toml")
    command = [sys.executable, "-m", "mobilellm", "train"]
    run, rng, kills = tmp_path / "run", random.Random(0), 0
    arguments = [str(tmp_path / "recipe.toml"), "--out", str(run)]
    for _ in range(12):
        process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.1, 1.0))
        if kills == 5:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        process.kill()
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        arguments = ["--resume", str(run)]
        if process.returncode == 0:
            break
    assert kills >= 3
    assert same(whole.checkpoint, checkpoint.complete(run)[-1])
    losses = [(row["step"], row["loss"]) for row in metrics(tmp_path / "whole")]
    assert [(row["step"], row["loss"]) for row in metrics(run)] == losses
    assert not list(run.rglob("*.partial-*"))


def test_killed_before_the_first_checkpoint_starts_over(recipe: Recipe, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert same(whole.checkpoint, resume(tmp_path / "run").checkpoint)


def test_accumulated_micro_batches_give_the_gradients_of_the_whole(recipe: Recipe, small_data: Path) -> None:
    from mobilellm.data.shards import TokenFolder

    data = TokenFolder.open(small_data)
    gradients = []
    for micro in (4, 1):
        trainer = loop.Trainer(recipe.replace("train", micro_batch=micro), data)
        batch, _ = next(iter(trainer.loader()))
        loss = trainer.forward_backward(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
        gradients.append((loss, [p.grad.clone() for p in trainer.network.parameters()]))
    assert gradients[0][0].item() == pytest.approx(gradients[1][0].item(), rel=1e-6)
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max() + 1e-9


def test_held_out_text_is_never_trained_on(recipe: Recipe, tmp_path: Path, small_data: Path) -> None:
    from mobilellm.data.shards import TokenFolder

    data = TokenFolder.open(small_data)
    trainer = loop.Trainer(recipe, data)
    assert len(trainer.train_tokens) == data.manifest["splits"]["train"]["tokens"]
    assert len(trainer.heldout_tokens) == data.manifest["splits"]["heldout"]["tokens"]
    names = {Path(p.filename).parent.name for p in trainer.train_tokens.parts}
    assert names == {"train"}


def test_checkpoints_load_in_transformers_as_they_stand(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mobilellm.interop.checkpoint import load

    path = train(tmp_path / "run", recipe).checkpoint
    theirs, ours = AutoModelForCausalLM.from_pretrained(path), load(path)
    ids = AutoTokenizer.from_pretrained(path)("First Citizen: speak", return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.tokenizer.encode("First Citizen: speak")
    with torch.no_grad():
        assert (theirs(ids).logits - ours.network(ids)).abs().max() < 1e-5


def test_a_layer_sharing_run_is_not_mistaken_for_a_plain_one(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = train(tmp_path / "run", recipe.replace("model", layer_repeats=2, shared_kv="first")).checkpoint
    assert json.loads((path / "config.json").read_text())["model_type"] == "mobilellm"
    with pytest.raises(ValueError, match="mobilellm"):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.Trainer.forward_backward, []

    def poisoned(self, inputs, targets):
        calls.append(1)
        loss = real(self, inputs, targets)
        return loss * float("nan") if len(calls) == 8 else loss

    monkeypatch.setattr(loop.Trainer, "forward_backward", poisoned)
    with pytest.raises(UserError, match=r"step 8: loss nan.*last good checkpoint: .*step-00000005"):
        train(tmp_path / "run", recipe)
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == ["step-00000005"]
    assert metrics(tmp_path / "run")[-1]["loss"] is None


FULL = (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)"))


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_while_saving_leaves_the_last_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, calls = checkpoint.save_file, []

    def full(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 1:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="no space left while writing"):
        train(tmp_path / "run", recipe)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert resume(tmp_path / "run").step == 24


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "train_state/optimizer.safetensors", "train_state/state.json", "checksums.json"]
)
def test_a_damaged_newest_checkpoint_is_rejected_and_the_one_before_used(
    recipe: Recipe, tmp_path: Path, damage: str, name: str
) -> None:
    whole = train(tmp_path / "run", recipe)
    kept = tmp_path / "kept"
    shutil.copytree(whole.checkpoint, kept)
    path = whole.checkpoint / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        if damage == "truncate":
            content = content[:-3]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)
    lines: list[str] = []

    class Listen(Watcher):
        def said(self, line: str) -> None:
            lines.append(line)

    outcome = resume(tmp_path / "run", Listen())
    assert any("rejected" in line and "step-00000024" in line for line in lines)
    assert same(kept, outcome.checkpoint)


def test_when_no_checkpoint_verifies_it_says_so(recipe: Recipe, tmp_path: Path) -> None:
    train(tmp_path / "run", recipe)
    for path in checkpoint.complete(tmp_path / "run"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint verifies"):
        resume(tmp_path / "run")


def test_wrong_starts_are_one_line(recipe: Recipe, tmp_path: Path) -> None:
    train(tmp_path / "run", recipe.replace("train", steps=1))
    with pytest.raises(UserError, match="holds another run"):
        train(tmp_path / "run", recipe)
    with pytest.raises(UserError, match="exceeds the model's context of 512"):
        train(tmp_path / "x", recipe.replace("data", sequence_length=1024).replace("train", batch_tokens=1024))
    with pytest.raises(UserError, match="less than one sample"):
        train(
            tmp_path / "x",
            recipe.replace("model", max_position_embeddings=1 << 17)
            .replace("data", sequence_length=1 << 16)
            .replace("train", batch_tokens=1 << 16),
        )
    with pytest.raises(UserError, match="no such data folder"):
        train(tmp_path / "x", recipe.replace("data", path=str(tmp_path / "none")))
    with pytest.raises(UserError, match="did you mean"):
        train(tmp_path / "x", recipe.replace("model", preset="1N"))
    with pytest.raises(UserError, match="no run here"):
        resume(tmp_path / "nothing")
    assert not (tmp_path / "x").exists()


def test_changed_data_is_refused_on_resume(recipe: Recipe, tmp_path: Path, sample_text: str) -> None:
    from mobilellm.data.documents import Source
    from mobilellm.data.prepare import prepare

    shutil.copytree(recipe.data.path, tmp_path / "data")
    recipe = recipe.replace("data", path=str(tmp_path / "data"))
    train(tmp_path / "run", recipe, StopAt(6))
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "t.txt").write_text(sample_text[100_000:160_000])
    prepare([Source("text", [tmp_path / "t.txt"])], tmp_path / "data", vocab_size=300)
    with pytest.raises(UserError, match="the data changed"):
        resume(tmp_path / "run")


def test_two_processes_do_not_train_one_run(recipe: Recipe, tmp_path: Path) -> None:
    from mobilellm.train.run import locked

    train(tmp_path / "run", recipe, StopAt(6))
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        resume(tmp_path / "run")


def test_compiled_training_equals_eager(recipe: Recipe, tmp_path: Path) -> None:
    from mobilellm.train.device import compiler_works

    if not compiler_works():
        pytest.skip("no C++ compiler that torch.compile can use")
    recipe = recipe.replace("train", steps=6)
    train(tmp_path / "eager", recipe)
    train(tmp_path / "compiled", recipe.replace("train", compile="block"))
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
