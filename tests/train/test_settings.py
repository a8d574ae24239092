"""What a recipe can ask for beside the plain loop: mixtures, masks, other layouts, branches,
trackers, traces, views."""

import contextlib
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.train.runs import Listener, metrics

from mobilellm.cli import main
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.optimizers.schedule import factor as schedule
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import (
    EvalSection,
    OptimizerSection,
    Recipe,
    StageSection,
)
from mobilellm.train import checkpoint
from mobilellm.train.loop import Trainer
from mobilellm.train.start import branch, resume, train
from mobilellm.train.step import TrainStep
from mobilellm.train.stopwatch import Stopwatch


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    folder = tmp_path_factory.mktemp("two")
    sources = []
    for name, start in (("early", 0), ("late", 400_000)):
        for number in range(20):
            begin = start + 3000 * number
            (folder / f"{name}{number}.txt").write_text(sample_text[begin : begin + 3000])
        sources.append(Source(name, sorted(folder.glob(f"{name}*.txt"))))
    prepare(sources, folder / "data", vocab_size=300, held_out=0.2)
    return folder / "data"


def test_a_mixture_is_read_by_its_weights_and_scored_by_source(
    recipe: Recipe, two_sources: Path, tmp_path: Path
) -> None:
    stages = (
        StageSection(weights={"early": 3.0, "late": 1.0}, until_tokens=12 * 128),
        StageSection(weights={"late": 1.0}),
    )
    recipe = recipe.replace("data", path=str(two_sources), stages=stages)
    whole = train(tmp_path / "run", recipe)
    rows = metrics(tmp_path / "run")
    data = TokenFolder.open(two_sources)
    passes = {name: len(data.tokens("train", name)) // 32 for name in data.sources()}
    assert rows[11]["epochs/early"] == pytest.approx(
        36 / passes["early"], abs=1.1 / passes["early"]
    )
    assert rows[11]["epochs/late"] == pytest.approx(12 / passes["late"], abs=1.1 / passes["late"])
    assert rows[23]["epochs/early"] == rows[11]["epochs/early"]
    assert rows[23]["epochs/late"] == pytest.approx(
        (12 + 48) / passes["late"], abs=1.1 / passes["late"]
    )
    assert {"held_out_loss/early", "held_out_loss/late"} <= set(rows[23])
    # Another mixture from a checkpoint on, without preparing anything again; and the same one bit
    # for bit.
    for name in ("step-00000020", "step-00000024"):
        for path in (tmp_path / "run/checkpoints" / name).rglob("*"):
            path.unlink() if path.is_file() else None
    resumed = resume(tmp_path / "run")
    assert resumed.held_out == whole.held_out
    changed = recipe.replace(
        "data", stages=(StageSection(weights={"early": 1.0}),), path=str(two_sources.resolve())
    )
    for path in (tmp_path / "run/checkpoints/step-00000024").rglob("*"):
        path.unlink() if path.is_file() else None
    other = resume(tmp_path / "run", changes=changed)
    assert other.held_out != whole.held_out
    with pytest.raises(UserError, match="did you mean 'early'"):
        train(tmp_path / "x", recipe.replace("data", stages=(StageSection(weights={"earl": 1.0}),)))


def test_masked_documents_train_as_if_alone(
    recipe: Recipe, two_sources: Path, tmp_path: Path
) -> None:
    recipe = recipe.replace(
        "data", path=str(two_sources), sequence_length=512, mask_documents=True
    ).replace("train", batch_tokens=8 * 512, steps=2, micro_batch_size=4)
    data = TokenFolder.open(two_sources)
    trainer = Trainer(recipe, data)
    batches = (batch for batch, _ in trainer.loader())
    batch = next(b for b in batches if (np.diff(b.documents, axis=1) > 0).any())
    loss = trainer.step.forward_backward(
        *(torch.from_numpy(a) for a in (batch.inputs, batch.targets, batch.documents))
    )
    alone = torch.zeros(())
    with torch.no_grad():
        for x, y, d in zip(batch.inputs, batch.targets, batch.documents, strict=True):
            for number in np.unique(d):
                mine = torch.from_numpy(d == number)
                alone += trainer.network.loss(
                    torch.from_numpy(x)[mine][None], torch.from_numpy(y)[mine][None], "sum"
                )
    assert loss.item() == pytest.approx(alone.item() / batch.targets.size, rel=1e-5)
    plain = train(tmp_path / "plain", recipe.replace("data", mask_documents=False))
    assert train(tmp_path / "masked", recipe).held_out != plain.held_out


def test_the_originals_layout_trains_as_it_stands(
    recipe: Recipe, small_data: Path, tmp_path: Path
) -> None:
    ids = TokenFolder.open(small_data).tokens("train").read(0, 40 * 65)
    for node in (1, 2):
        (tmp_path / f"base/{node}").mkdir(parents=True)
        lines = [
            json.dumps({"token_ids": row.tolist()}) for row in ids.reshape(40, 65)[node - 1 :: 2]
        ]
        (tmp_path / f"base/{node}/a.jsonl").write_text("\n".join(lines) + "\n")
    TokenFolder.open(small_data).tokenizer().save(tmp_path)
    recipe = recipe.replace(
        "data",
        path=str(tmp_path / "base"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sequence_length=64,
    )
    recipe.write(tmp_path / "r.toml")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    assert metrics(tmp_path / "run")[-1]["loss"] < metrics(tmp_path / "run")[0]["loss"]
    assert (tmp_path / "run/report.html").is_file()
    with pytest.raises(UserError, match="samples without a tokenizer"):
        train(tmp_path / "x", recipe.replace("data", tokenizer=""))


def test_the_wsd_schedule_holds_and_falls() -> None:
    section = OptimizerSection(
        schedule="wsd", warmup_steps=10, decay_steps=20, final_lr_fraction=0.0
    )
    rates = [schedule(step, 100, section) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:80] == [1.0] * 70
    assert rates[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])
    root = [
        schedule(
            step,
            100,
            OptimizerSection(schedule="wsd", warmup_steps=0, decay_steps=20, decay_shape="sqrt"),
        )
        for step in range(80, 100)
    ]
    assert root == pytest.approx([1 - 0.9 * ((i + 1) / 20) ** 0.5 for i in range(20)])


def test_a_branch_decays_from_a_stable_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.replace("optimizer", schedule="wsd", decay_steps=9, final_lr_fraction=0.0)
    train(tmp_path / "long", recipe.replace("train", keep_checkpoints=0))
    start = checkpoint.checkpoint_folder(tmp_path / "long", 10)
    outcome = branch(tmp_path / "short", start, decay_steps=6)
    rows = metrics(tmp_path / "short")
    assert (outcome.step, rows[0]["step"]) == (16, 11)
    assert [r["learning_rate"] / 3e-3 for r in rows] == pytest.approx(
        [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )
    assert (
        rows[0]["loss"] == metrics(tmp_path / "long")[10]["loss"]
    )  # the same weights and the same batch
    assert json.loads((tmp_path / "short/environment.json").read_text())["branched_from"] == str(
        start.resolve()
    )
    # What a run of that length from the beginning ends with.
    direct = train(
        tmp_path / "direct", recipe.replace("train", steps=16).replace("optimizer", decay_steps=6)
    )
    a, b = (load_file(o.checkpoint / "model.safetensors") for o in (outcome, direct))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="falls already"):
        branch(tmp_path / "x", checkpoint.checkpoint_folder(tmp_path / "long", 20))
    cosine = train(
        tmp_path / "cosine", recipe.replace("optimizer", schedule="cosine", decay_steps=0)
    )
    with pytest.raises(UserError, match="schedule is cosine"):
        branch(tmp_path / "x", cosine.checkpoint)


def test_the_stopwatch_adds_up_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.5, 4.0, 9.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    for phase in ("data", "compute", "optimizer", "data"):
        watch.mark(phase)
    lap = watch.lap()
    assert watch.seconds(lap) == {"data": 1.0 + 5.0, "compute": 2.5, "optimizer": 0.5}
    watch.mark("compute")  # a new lap knows nothing of the one before
    assert watch.seconds(watch.lap()) == {"compute": 1.0}


def test_metrics_tell_where_the_time_goes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each phase is slowed by a time of its own, and its metric shows that and no other's."""
    slow = {"forward_backward": 0.05, "update": 0.1}
    for name, seconds in slow.items():
        real = getattr(TrainStep, name)

        def slowed(self, *arguments, real=real, seconds=seconds):
            time.sleep(seconds)
            return real(self, *arguments)

        monkeypatch.setattr(TrainStep, name, slowed)
    begun = time.perf_counter()
    train(tmp_path / "run", recipe.replace("train", profile_steps=2, steps=15))
    passed = time.perf_counter() - begun
    rows = metrics(tmp_path / "run")
    phases = ("data_seconds", "compute_seconds", "optimizer_seconds")
    found = {phase: sorted(row[phase] for row in rows)[len(rows) // 2] for phase in phases}
    assert 0.05 <= found["compute_seconds"] < 0.1 <= found["optimizer_seconds"]
    assert 0 < found["data_seconds"] < 0.05
    assert sum(row[phase] for row in rows for phase in phases) <= passed
    assert all(row["memory_bytes"] > 1 << 20 for row in rows)
    assert [row["step"] for row in rows if "checkpoint_seconds" in row] == [5, 10, 15]
    assert rows[-1]["mfu_palm"] > rows[-1]["mfu_6n"] > 0
    trace = json.loads((tmp_path / "run/profile-rank0.json").read_text())
    assert len(trace["traceEvents"]) > 100


def tracked(recipe: Recipe, **track: Any) -> Recipe:
    return recipe.replace("track", **track)


def test_tensorboard_gets_what_metrics_hold(recipe: Recipe, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    train(
        tmp_path / "run",
        tracked(recipe, tensorboard=True, every=4),
    )
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [4, 8, 12, 16, 20, 24]
    assert all(event.value == pytest.approx(rows[event.step]["loss"]) for event in losses)
    assert [event.step for event in events.Scalars("held_out_loss")] == [8, 16, 24]


def test_trackio_gets_what_metrics_hold(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    train(tmp_path / "run", tracked(recipe, trackio="tests", every=4))
    rows = {row["step"]: row for row in metrics(tmp_path / "run")}
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio/tests.db")) as database:
        kept = database.execute("select step, metrics from metrics order by step").fetchall()
        (name,) = database.execute("select distinct run_name from metrics").fetchone()
    assert name == "run"
    assert [step for step, _ in kept] == [4, 8, 12, 16, 20, 24]
    for step, values in kept:
        assert json.loads(values)["loss"] == pytest.approx(rows[step]["loss"])


def test_weights_and_biases_offline(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "run", tracked(recipe, wandb="tests", every=4))
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_a_tracker_that_breaks_does_not_end_the_run(
    recipe: Recipe, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mobilellm.tracking import trackers

    def broken(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "_wandb", lambda *_: (broken, broken))
    train(tmp_path / "run", tracked(recipe, wandb="tests"), listener)
    assert listener.lines == ["wandb failed and is left out from now on: no network"]


def test_watch_and_report_show_runs(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "a", recipe)
    train(tmp_path / "b<i>", recipe.replace("optimizer", learning_rate=1e-3))

    def call(*arguments: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == status
        both = capsys.readouterr()
        return both.out if not status else both.err

    shown = call("watch", str(tmp_path / "a"))
    assert "step 24/24" in shown
    assert "held-out (bits a byte)" in shown
    assert sum(0x2800 < ord(c) <= 0x28FF for c in shown) > 50
    page = Path(
        call(
            "report", str(tmp_path / "a"), str(tmp_path / "b<i>"), "--out", str(tmp_path / "c.html")
        ).strip()
    )
    text = page.read_text()
    assert text.count("<svg") >= 5
    assert "b&lt;i&gt;" in text
    assert "b<i>" not in text
    assert "optimizer.learning_rate" in text  # what differs
    assert "optimizer.weight_decay" not in text
    assert "no run here" in call("watch", str(tmp_path / "none"), status=2)
    assert "add --out" in call("report", str(tmp_path / "a"), str(tmp_path / "b<i>"), status=2)


def test_other_data_are_refused_unless_allowed(
    recipe: Recipe, small_data: Path, two_sources: Path, tmp_path: Path
) -> None:
    tokenizer = TokenFolder.open(small_data).tokenizer()
    tokenizer.save(tmp_path)
    (tmp_path / "t.txt").write_text("Another text altogether. " * 400)
    prepare(
        [Source("t", [tmp_path / "t.txt"])], tmp_path / "data", tokenizer=tokenizer, held_out=0.1
    )
    train(tmp_path / "run", recipe)
    other = (
        (tmp_path / "run/recipe.toml")
        .read_text()
        .replace(str(small_data.resolve()), str(tmp_path / "data"))
    )
    (tmp_path / "run/recipe.toml").write_text(other)
    with pytest.raises(
        UserError, match=r"the data changed since step-00000024.*--allow-data-change"
    ):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", allow_data_change=True).step == 24
    (tmp_path / "run/recipe.toml").write_text(
        other.replace(str(tmp_path / "data"), str(two_sources))
    )
    with pytest.raises(UserError, match="made with tokenizer"):
        resume(tmp_path / "run", allow_data_change=True)


def test_zero_shot_tasks_in_the_loop(recipe: Recipe, shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = EvalSection(tasks=("piqa", "arc_easy"), every=10, limit=4, data=str(shared / "eval"))
    plain = train(tmp_path / "plain", recipe)
    tested = train(tmp_path / "run", Recipe(**vars(recipe) | {"eval": tasks}))
    rows = [row for row in metrics(tmp_path / "run") if "piqa/acc" in row]
    assert [row["step"] for row in rows] == [10, 20, 24]
    assert all(
        row[f"{name}/acc"] in (0, 0.25, 0.5, 0.75, 1)
        for row in rows
        for name in ("piqa", "arc_easy")
    )
    a, b = (load_file(outcome.checkpoint / "model.safetensors") for outcome in (plain, tested))
    assert all(torch.equal(a[name], b[name]) for name in a)  # looking changes nothing
    with pytest.raises(UserError, match="did you mean 'piqa'"):
        train(
            tmp_path / "x",
            Recipe(
                **vars(recipe) | {"eval": EvalSection(tasks=("piqua",), every=1, data=tasks.data)}
            ),
        )
