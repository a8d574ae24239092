"""Several processes, as torchrun starts them: the same sums, the same order, and one that dies
or hangs."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train.runs import metrics, same_tensors

from mobilellm.errors import UserError
from mobilellm.recipe.recipe import (
    Recipe,
)
from mobilellm.train import checkpoint
from mobilellm.train.start import resume, train

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """As elsewhere, with twelve sequences a step that several processes can divide."""
    return recipe.replace(
        "train", batch_tokens=384, micro_batch_size=2, log_every=1, threads=1
    ).replace("parallel", timeout=60)


def torchrun(processes: int, *command: object, more: tuple[str, ...] = ()) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), *more, *map(str, command)]


def job(processes: int, scenario: str, recipe: Recipe, folder: Path) -> None:
    recipe.write(folder / "recipe.toml")
    done = subprocess.run(
        torchrun(processes, WORKER, scenario, folder / "recipe.toml", folder),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("processes", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_are_those_of_one_process(recipe: Recipe, tmp_path: Path, processes: int) -> None:
    job(processes, "gradients", recipe, tmp_path)


def test_gradients_by_onednn_are_those_of_one_process(recipe: Recipe, tmp_path: Path) -> None:
    job(2, "gradients", recipe.replace("train", products="onednn"), tmp_path)


def test_the_masked_mean_is_that_of_one_process(recipe: Recipe, tmp_path: Path) -> None:
    job(2, "masked", recipe, tmp_path)


@pytest.mark.parametrize(
    ("kind", "go_on", "steps"),
    [
        ("adamw", (3, "fsdp", 0), 20),
        pytest.param("muon", (4, "fsdp", 2), 60, marks=pytest.mark.long),
        pytest.param("normuon", (2, "fsdp", 0), 60, marks=pytest.mark.long),
        pytest.param("adamw", (3, "ddp", 0), 60, marks=pytest.mark.long),
        pytest.param("adamw", (3, "fsdp", 0), 60, marks=pytest.mark.long),
    ],
)
def test_resumed_in_another_world_and_in_the_same(
    recipe: Recipe, tmp_path: Path, kind: str, go_on: tuple[int, str, int], steps: int
) -> None:
    cautious = {"cautious_weight_decay": kind == "normuon"}
    recipe = recipe.replace("optimizer", name=kind, **cautious).replace("train", steps=steps)
    alone = train(tmp_path / "alone", recipe)
    job(2, "whole-and-stopped", recipe, tmp_path)
    last = [
        checkpoint.complete(tmp_path / name)[-1] for name in ("whole", "stopped-here", "stopped")
    ]
    # The last one stopped a step after the signal.
    assert [p.name for p in last] == [f"step-{step:08d}" for step in (steps, steps, 11)]
    assert same_tensors(last[0], last[1])  # bit for bit in the same world
    processes, parallel, within = go_on
    job(
        processes,
        "go-on",
        recipe.replace("parallel", kind=parallel, shard_group_size=within),
        tmp_path,
    )
    for name in ("whole", "stopped"):
        for mine, theirs in zip(metrics(tmp_path / name), metrics(alone.run), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert metrics(tmp_path / name)[-1]["held_out_loss"] == pytest.approx(
            alone.held_out.loss, rel=1e-5
        )
    # And what several processes wrote, one goes on with.
    assert resume(tmp_path / "stopped").step == steps


class Job:
    """`mobilellm train` under torchrun, with its workers' process numbers."""

    def __init__(self, recipe: Recipe, folder: Path, *more: str, restarts: int = 0) -> None:
        recipe.write(folder / "recipe.toml")
        self.run = folder / "run"
        arguments = (
            "-m",
            "mobilellm",
            "train",
            folder / "recipe.toml",
            "--out",
            self.run,
            "--resume",
            "auto",
            *more,
        )
        watched = ("--max-restarts", str(restarts), "--monitor-interval", "0.1")
        self.process = subprocess.Popen(
            torchrun(2, *arguments, more=watched),
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def workers(self) -> list[int]:
        """Process numbers by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().split(") ")[1].split()[1]) != self.process.pid:
                    continue
                environment = (folder / "environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            ranks = [
                int(entry.removeprefix("RANK="))
                for entry in environment
                if entry.startswith("RANK=")
            ]
            found.update({rank: int(folder.name) for rank in ranks})
        return [found[rank] for rank in sorted(found)]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 100
        while self.process.poll() is None and time.monotonic() < deadline:
            if (self.run / "metrics.jsonl").is_file() and len(
                (self.run / "metrics.jsonl").read_bytes().splitlines()
            ) >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was never reached: {self.end()[-3000:]}")

    def end(self, timeout: float = 150) -> str:
        """Wait for its end; returns what it said."""
        try:
            return self.process.communicate(timeout=timeout)[1]
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for one in started:
        if one.process.poll() is None:
            for pid in one.workers():
                os.kill(pid, signal.SIGKILL)
            os.killpg(one.process.pid, signal.SIGKILL)


def test_a_rank_that_dies_is_brought_back_by_torchrun(
    recipe: Recipe, tmp_path: Path, jobs: list[Job]
) -> None:
    recipe = recipe.replace("train", steps=160, checkpoint_every=20, evaluate_every=0)
    jobs.append(job := Job(recipe, tmp_path, restarts=2))
    job.wait_for_step(50)
    os.kill(job.workers()[1], signal.SIGKILL)
    said = job.end()
    assert job.process.returncode == 0, said[-3000:]
    assert re.search(r"from step (40|60|80|100|120)", said), said[-3000:]
    assert [row["step"] for row in metrics(job.run)] == list(range(1, 161))


def test_a_rank_that_hangs_is_named(recipe: Recipe, tmp_path: Path, jobs: list[Job]) -> None:
    recipe = recipe.replace("train", steps=100_000, evaluate_every=0, checkpoint_every=10_000)
    jobs.append(job := Job(recipe.replace("parallel", timeout=3.0), tmp_path))
    job.wait_for_step(20)
    hanging = job.workers()[1]
    os.kill(hanging, signal.SIGSTOP)
    start = time.monotonic()
    while (
        job.process.poll() is None
        and time.monotonic() - start < 60
        and job.workers()[:1] != [hanging]
    ):
        time.sleep(0.2)
    os.kill(hanging, signal.SIGKILL)  # torchrun cannot end a stopped process by asking
    said = job.end()
    assert re.search(
        r"mobilellm: rank 0 has waited \d+ s in step \d+ for rank 1 \(last seen before step \d+\)",
        said,
    ), said[-3000:]


def test_signals_save_and_end_with_a_status_that_schedulers_know(
    recipe: Recipe, tmp_path: Path
) -> None:
    recipe.replace("train", steps=100_000, evaluate_every=0, checkpoint_every=10_000).write(
        tmp_path / "recipe.toml"
    )
    arguments = [
        sys.executable,
        "-m",
        "mobilellm",
        "train",
        str(tmp_path / "recipe.toml"),
        "--out",
        str(tmp_path / "run"),
    ]
    for number, status in ((signal.SIGUSR1, 75), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            [*arguments, "--resume", "auto"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        rows = len(metrics(tmp_path / "run")) if (tmp_path / "run/metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "run/metrics.jsonl").exists() and len(
                metrics(tmp_path / "run")
            ) > rows + 5:
                break
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == status, said
        assert (
            checkpoint.complete(tmp_path / "run")[-1].name
            == f"step-{metrics(tmp_path / 'run')[-1]['step']:08d}"
        )


def test_a_missing_rank_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    recipe.write(tmp_path / "recipe.toml")
    arguments = [
        sys.executable,
        "-m",
        "mobilellm",
        "train",
        str(tmp_path / "recipe.toml"),
        "--out",
        str(tmp_path / "run"),
    ]
    world = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29683",
    }
    done = subprocess.run(
        [*arguments, "--parallel.timeout", "1"],
        env=ENVIRONMENT | world,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("mobilellm: ")]
    assert len(lines) == 1, done.stderr
    assert "not all 2 processes came within 6 s" in lines[0]
    assert "Traceback" not in done.stderr


def test_what_may_change_on_resume_and_what_may_not(recipe: Recipe, tmp_path: Path) -> None:
    train(tmp_path / "run", recipe.replace("train", steps=3))
    with pytest.raises(
        UserError,
        match=r"optimizer.learning_rate is 0.003 there, 0.5 here; train.steps is 3 there, 24 here",
    ):
        resume(tmp_path / "run", changes=recipe.replace("optimizer", learning_rate=0.5))
    assert (
        resume(
            tmp_path / "run",
            changes=recipe.replace("train", steps=3, micro_batch_size=1, precision="auto"),
        ).step
        == 3
    )


@pytest.mark.long
def test_twenty_random_kills_change_nothing(
    recipe: Recipe, tmp_path: Path, jobs: list[Job]
) -> None:
    """A rank dies twenty times in 300 steps of two processes, at any moment; the weights are
    those of a quiet run."""
    recipe = recipe.replace("train", steps=300, checkpoint_every=9, evaluate_every=40)
    (tmp_path / "quiet").mkdir()
    jobs.append(quiet := Job(recipe, tmp_path / "quiet"))
    quiet.end()
    assert quiet.process.returncode == 0
    rng, kills, reached = random.Random(0), 0, 0
    (tmp_path / "drill").mkdir()
    while kills < 20:
        jobs.append(job := Job(recipe, tmp_path / "drill"))
        # Each life gets a little further than the last one's checkpoint, so that twenty of them fit
        # into the run.
        reached = len(metrics(job.run)) if (job.run / "metrics.jsonl").exists() else 0
        target = min(15 * (kills + 1), 290)
        job.wait_for_step(max(1, min(target, reached + 15)))
        time.sleep(rng.uniform(0, 0.15))
        workers = job.workers()
        if workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
        job.end()
        assert job.process.returncode != 0
        kills += 1
    jobs.append(job := Job(recipe, tmp_path / "drill"))
    said = job.end()
    assert job.process.returncode == 0, said[-3000:]
    assert same_tensors(checkpoint.complete(quiet.run)[-1], checkpoint.complete(job.run)[-1])
    keys = ("step", "loss", "grad_norm", "tokens", "held_out_loss")
    assert [[r.get(k) for k in keys] for r in metrics(job.run)] == [
        [r.get(k) for k in keys] for r in metrics(quiet.run)
    ]
    assert not list(job.run.rglob("*.partial-*"))
