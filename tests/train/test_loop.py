"""Whole small runs: they learn, end, resume to the bit, and stop when they must."""

import dataclasses
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.train.runs import Listener, StopAt, metrics, same

from mobilellm.distributed.parallel import Parallel
from mobilellm.errors import UserError
from mobilellm.recipe.recipe import (
    Recipe,
)
from mobilellm.train import checkpoint, loop, step
from mobilellm.train.inputs import open_data
from mobilellm.train.start import resume, train

NAN, INF = float("nan"), float("inf")


def test_a_run_documents_itself(recipe: Recipe, tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", recipe)
    assert (outcome.step, outcome.interrupted) == (24, None)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(
        rows[0]
    )
    assert [row["step"] for row in rows if "held_out_loss" in row] == [8, 16, 24]
    assert rows[-1]["tokens"] == 24 * 128
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert Recipe.read(tmp_path / "run/recipe.toml") == recipe.replace(
        "data", path=str(Path(recipe.data.path).resolve())
    )
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert {"torch", "device", "commit", "data_fingerprint", "precision"} <= set(environment)
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == [
        "step-00000015",
        "step-00000020",
        "step-00000024",
    ]


def test_one_seed_is_one_run_and_another_is_another(recipe: Recipe, tmp_path: Path) -> None:
    a, b = train(tmp_path / "a", recipe), train(tmp_path / "b", recipe)
    assert same(a.checkpoint, b.checkpoint)
    c = train(tmp_path / "c", recipe.replace("train", seed=1))
    assert not same(a.checkpoint, c.checkpoint)


CAREFUL = {"cautious_weight_decay": True, "weight_decay_schedule": "learning_rate"}


@pytest.mark.parametrize(
    ("kind", "careful", "stop"),
    [
        *((kind, False, stop) for stop in (1, 7, 23) for kind in ("adamw", "muon")),
        ("adamw", True, 7),
        ("normuon", True, 7),
    ],
)
def test_interrupted_and_resumed_equals_undisturbed(
    recipe: Recipe, tmp_path: Path, kind: str, careful: bool, stop: int
) -> None:
    """`careful` has what draws at random and what bends the weight decay, too."""
    recipe = recipe.replace("optimizer", name=kind).replace("train", log_every=1)
    if careful:
        recipe = recipe.replace("optimizer", **CAREFUL).replace("train", dropout=0.1)
    whole = train(tmp_path / "whole", recipe)
    first = train(tmp_path / "run", recipe, StopAt(stop))
    assert (first.step, first.interrupted) == (stop, "SIGINT")
    assert checkpoint.read_state(first.checkpoint).guard[0] == stop  # steps it has seen
    second = resume(tmp_path / "run")
    assert second.step == 24
    assert same(whole.checkpoint, second.checkpoint)
    keys = ("step", "loss", "grad_norm", "tokens", "learning_rate", "held_out_loss")
    assert [[r.get(k) for k in keys] for r in metrics(tmp_path / "whole")] == [
        [r.get(k) for k in keys] for r in metrics(tmp_path / "run")
    ]


def test_what_draws_at_random_goes_on_with_the_same_draws(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the loop draws after the first weights; here every step does, as dropout would."""
    real = step.TrainStep.forward_backward

    def noisy(self, *arguments):
        loss = real(self, *arguments)
        for parameter in self.network.parameters():
            parameter.grad.mul_(torch.rand(()))
        return loss

    monkeypatch.setattr(step.TrainStep, "forward_backward", noisy)
    whole = train(tmp_path / "whole", recipe)
    assert train(tmp_path / "run", recipe, StopAt(6)).step == 6
    torch.manual_seed(123)  # a process that begins anew stands elsewhere in its draws
    assert same(whole.checkpoint, resume(tmp_path / "run").checkpoint)


@pytest.mark.long
def test_killed_at_arbitrary_steps_and_resumed_equals_undisturbed(
    recipe: Recipe, tmp_path: Path
) -> None:
    """SIGKILL, five times, at any moment: between steps, while evaluating, while writing a
    checkpoint."""
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


def test_accumulated_micro_batches_give_the_gradients_of_the_whole(
    recipe: Recipe, small_data: Path
) -> None:
    from mobilellm.data.token_folder import TokenFolder

    data = TokenFolder.open(small_data)
    gradients = []
    for micro in (4, 1):
        trainer = loop.Trainer(recipe.replace("train", micro_batch_size=micro), data)
        batch, _ = next(iter(trainer.loader()))
        loss = trainer.step.forward_backward(
            torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        )
        gradients.append((loss, [p.grad.clone() for p in trainer.network.parameters()]))
    assert gradients[0][0].item() == pytest.approx(gradients[1][0].item(), rel=1e-6)
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max() + 1e-9


def test_held_out_text_is_never_trained_on(
    recipe: Recipe, tmp_path: Path, small_data: Path
) -> None:
    from mobilellm.data.token_folder import TokenFolder

    data = TokenFolder.open(small_data)
    trainer = loop.Trainer(recipe, data)
    stream = trainer.loader().stream
    assert len(stream) == data.manifest["splits"]["train"]["tokens"]
    assert len(data.tokens("held_out")) == data.manifest["splits"]["held_out"]["tokens"]
    names = {Path(p.filename).parent.name for p in stream.parts}
    assert names == {"train"}


def test_checkpoints_load_in_transformers_as_they_stand(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mobilellm.interop.load import load

    path = train(tmp_path / "run", recipe).checkpoint
    theirs, ours = AutoModelForCausalLM.from_pretrained(path), load(path)
    ids = AutoTokenizer.from_pretrained(path)("First Citizen: speak", return_tensors="pt").input_ids
    assert ids[0].tolist() == ours.tokenizer.encode("First Citizen: speak")
    with torch.no_grad():
        assert (theirs(ids).logits - ours.network(ids)).abs().max() < 1e-5


def test_a_layer_sharing_run_is_not_mistaken_for_a_plain_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = train(
        tmp_path / "run",
        recipe.replace(
            "model", override={"num_hidden_layers": 2, "layer_repeats": 2, "shared_kv": "first"}
        ),
    ).checkpoint
    assert json.loads((path / "config.json").read_text())["model_type"] == "mobilellm"
    with pytest.raises(ValueError, match="mobilellm"):
        AutoModelForCausalLM.from_pretrained(path)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Give the gradients and losses of some steps (from 1) a value."""
    real, calls = step.TrainStep.forward_backward, []

    def poisoned(self, *arguments):
        calls.append(1)
        loss = real(self, *arguments)
        if len(calls) in steps:
            for parameter in self.network.parameters():
                parameter.grad.mul_(value)
            loss = loss * value
        return loss

    monkeypatch.setattr(step.TrainStep, "forward_backward", poisoned)


@pytest.mark.parametrize(
    ("kind", "cautious", "value"),
    [
        *((kind, False, value) for value in (NAN, INF, 1e4) for kind in ("adamw", "muon")),
        *((kind, True, NAN) for kind in ("adamw", "normuon")),
    ],
)
def test_a_bad_step_is_skipped_and_counted(
    recipe: Recipe,
    tmp_path: Path,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    cautious: bool,
    value: float,
) -> None:
    monkeypatch.setattr("mobilellm.optimizers.guard.FIRST", 5)
    recipe = recipe.replace("optimizer", name=kind, cautious_weight_decay=cautious).replace(
        "train", spike_threshold=20.0, checkpoint_every=1, keep_checkpoints=0
    )
    poison(monkeypatch, {8}, value)
    train(tmp_path / "run", recipe, listener)
    rows = metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0] * 7 + [1] * 17
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [line for line in listener.lines if "skipped" in line] == [
        line for line in listener.lines if line.startswith("step 8: loss")
    ]
    assert "epoch 0, samples from 28 on" in next(
        line for line in listener.lines if "skipped" in line
    )
    before, after = (
        load_file(tmp_path / f"run/checkpoints/step-{n:08d}/model.safetensors") for n in (7, 8)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    moments = [
        load_file(
            next((tmp_path / f"run/checkpoints/step-{n:08d}/train_state").glob("*.safetensors"))
        )
        for n in (7, 8)
    ]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_too_many_bad_steps_in_a_row_stop_and_name_the_samples(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3, 9, 10, 11, 12})
    with pytest.raises(
        UserError,
        match=r"step 11: loss nan.* 3 steps skipped in a row .*samples from 40 on, 4 a step"
        r".* last good.*step-00000010",
    ):
        train(tmp_path / "run", recipe.replace("train", max_skipped_in_a_row=3))
    assert metrics(tmp_path / "run")[-1]["loss"] is None
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [
        0,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
        3,
        4,
        5,
    ]


def test_running_out_of_memory_halves_the_micro_batch_and_says_so(
    recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", recipe)
    real, sizes = Parallel.__call__, []

    def small(self, inputs, *rest):
        sizes.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, *rest)

    monkeypatch.setattr(Parallel, "__call__", small)
    outcome = train(tmp_path / "run", recipe, listener)
    assert sizes == [4, *[2] * 48]
    assert listener.lines == ["out of memory: the micro-batch is 2 sequences from now on"]
    a, b = (
        load_file(whole.checkpoint / "model.safetensors"),
        load_file(outcome.checkpoint / "model.safetensors"),
    )
    assert all((a[name] - b[name]).abs().max() < 1e-3 for name in a)
    monkeypatch.setattr(
        Parallel,
        "__call__",
        lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    )
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1 x 32 tokens"):
        train(tmp_path / "none", recipe)


def test_a_resumed_run_keeps_its_micro_batch(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was halved when memory ran out, or found by trying, where it is left open."""
    recipe = recipe.replace("train", micro_batch_size=0, checkpoint_every=5)
    real, sizes = Parallel.__call__, []

    def at_most(largest: int) -> Callable[..., torch.Tensor]:
        def call(self, inputs, *rest):
            sizes.append(len(inputs))
            if len(inputs) > largest:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(self, inputs, *rest)

        return call

    monkeypatch.setattr(Parallel, "__call__", at_most(1))
    whole = train(tmp_path / "run", recipe)
    run = tmp_path / "again"
    shutil.copytree(tmp_path / "run", run)
    shutil.rmtree(run / "checkpoints" / whole.checkpoint.name)
    monkeypatch.setattr(Parallel, "__call__", at_most(1 << 20))
    sizes.clear()
    again = resume(run)
    assert set(sizes[1:]) == {1}  # a GPU tries first what fits
    assert same(again.checkpoint, whole.checkpoint)
    shutil.rmtree(again.checkpoint)
    sizes.clear()
    resume(run, changes=recipe.replace("train", micro_batch_size=2))
    assert set(sizes) == {2}


@pytest.mark.parametrize(
    ("device", "processes", "given", "before", "now"),
    [
        ("cpu", 1, 0, 2, 2),
        ("cpu", 1, 0, 8, 4),  # it does not fit any more
        ("cuda", 1, 0, 2, 4),
        ("cpu", 2, 0, 2, 4),
        ("cpu", 1, 4, 2, 4),
        ("", 0, 0, 0, 4),  # a checkpoint of an earlier version
    ],
)
def test_the_micro_batch_is_kept_where_nothing_changed(
    device: str, processes: int, given: int, before: int, now: int, tmp_path: Path, recipe: Recipe
) -> None:
    recipe = recipe.replace("train", micro_batch_size=given)
    listener = Listener()
    trainer = loop.Trainer(recipe, open_data(recipe), listener)
    assert trainer.step.batching.micro_batch_size == 4
    state = dataclasses.replace(
        trainer.state, micro_batch_size=before, device=device, processes=processes
    )
    trainer._keep_micro_batch(state)
    assert trainer.step.batching.micro_batch_size == now
    assert bool(listener.lines) == (before > 4)


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_while_saving_is_loud_and_training_goes_on(
    recipe: Recipe,
    tmp_path: Path,
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    background: bool,
) -> None:
    whole = train(tmp_path / "whole", recipe)
    real, calls = checkpoint.write_checkpoint, []

    def full(*arguments, **keywords):
        calls.append(1)
        if len(calls) in (2, 3):
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    outcome = train(
        tmp_path / "run", recipe.replace("train", async_checkpoints=background), listener
    )
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step-00000005", "step-00000020", "step-00000024"
    ]  # fmt: skip
    assert len(listener.lines) == 2
    assert all(
        "CHECKPOINT NOT WRITTEN" in line and "no space left while writing" in line
        for line in listener.lines
    )
    assert same(whole.checkpoint, outcome.checkpoint)


def test_a_disk_that_stays_full_ends_in_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.write_checkpoint, []

    def full(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **keywords)

    monkeypatch.setattr(checkpoint, "write_checkpoint", full)
    with pytest.raises(
        UserError,
        match=r"the last checkpoint was not written: .*no space left"
        r".*last good one: .*step-00000005",
    ):
        train(tmp_path / "run", recipe)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert resume(tmp_path / "run").step == 24


def test_a_write_error_of_the_optimizer_state_is_loud_too(
    recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    real, calls = HuggingFaceStorageWriter.write_data, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    train(tmp_path / "run", recipe, listener)
    assert len(listener.lines) == 1
    assert "CHECKPOINT NOT WRITTEN" in listener.lines[0]
    assert "no space left" in listener.lines[0]
    assert not list((tmp_path / "run").rglob("*partial*"))


def test_every_nth_checkpoint_is_kept(recipe: Recipe, tmp_path: Path) -> None:
    train(
        tmp_path / "run",
        recipe.replace("train", checkpoint_every=2, keep_checkpoints=2, keep_every=8),
    )
    assert [p.name for p in checkpoint.complete(tmp_path / "run")] == [
        "step-00000008", "step-00000016", "step-00000022", "step-00000024"
    ]  # fmt: skip


def test_nothing_of_a_checkpoint_is_a_pickle(recipe: Recipe, tmp_path: Path) -> None:
    path = train(tmp_path / "run", recipe.replace("train", steps=2)).checkpoint
    found = {p.suffix for p in path.rglob("*") if p.is_file() and p.name != "README.md"}
    assert found == {".json", ".safetensors", ".toml"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "train_state/shard-00001-model-00001-of-00001.safetensors",
        "train_state/state.json",
        "checksums.json",
    ],
)
def test_a_damaged_newest_checkpoint_is_rejected_and_the_one_before_used(
    recipe: Recipe, tmp_path: Path, listener: Listener, damage: str, name: str
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
    outcome = resume(tmp_path / "run", listener)
    assert any("rejected" in line and "step-00000024" in line for line in listener.lines)
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
        train(
            tmp_path / "x",
            recipe.replace("data", sequence_length=1024).replace("train", batch_tokens=1024),
        )
    with pytest.raises(UserError, match="less than one sample"):
        train(
            tmp_path / "x",
            recipe.replace(
                "model", override={"num_hidden_layers": 2, "max_position_embeddings": 1 << 17}
            )
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


def test_changed_data_is_refused_on_resume(
    recipe: Recipe, tmp_path: Path, sample_text: str
) -> None:
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source

    shutil.copytree(recipe.data.path, tmp_path / "data")
    recipe = recipe.replace("data", path=str(tmp_path / "data"))
    train(tmp_path / "run", recipe, StopAt(6))
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "t.txt").write_text(sample_text[100_000:160_000])
    prepare([Source("text", [tmp_path / "t.txt"])], tmp_path / "data", vocab_size=300)
    with pytest.raises(UserError, match="the data changed"):
        resume(tmp_path / "run")


def test_two_processes_do_not_train_one_run(recipe: Recipe, tmp_path: Path) -> None:
    from mobilellm.train.run_folder import hold

    train(tmp_path / "run", recipe, StopAt(6))
    with hold(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        resume(tmp_path / "run")


def test_compiled_training_equals_eager(recipe: Recipe, tmp_path: Path) -> None:
    from mobilellm.hardware.probes import compiler_works

    if not compiler_works():
        pytest.skip("no C++ compiler that torch.compile can use")
    recipe = recipe.replace("train", steps=6)
    train(tmp_path / "eager", recipe)
    train(tmp_path / "compiled", recipe.replace("train", compile="block"))
    for a, b in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
