"""The scripts that start runs: read by shellcheck, and run."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train.runs import metrics

from mobilellm.recipe.recipe import Recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def recipe_file(recipe: Recipe, tmp_path: Path) -> Path:
    """A recipe of 20 steps that names no data."""
    short = recipe.replace(
        "train", steps=20, evaluate_every=0, checkpoint_every=100, log_every=1, threads=1
    )
    short.replace("data", path="").write(tmp_path / "recipe.toml")
    return tmp_path / "recipe.toml"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with a `python` and a `mobilellm` that are this one's."""
    (tmp_path / "bin").mkdir()
    for name, words in (("mobilellm", "-m mobilellm"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_the_scripts_pass_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("no shellcheck")
    done = subprocess.run(
        [tool, SCRIPTS / "pretrain.sh", SCRIPTS / "train.sbatch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_pretrain_sh_starts_and_goes_on(
    recipe_file: Path, small_data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    command = [
        str(SCRIPTS / "pretrain.sh"),
        str(recipe_file),
        str(small_data),
        str(tmp_path / "run"),
    ]
    for _ in range(2):  # the second finds the run at its end
        done = subprocess.run(
            [*command, "--train.log-every", "5"],
            env=environment | {"PROCESSES": "2"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(metrics(tmp_path / "run")) == 20
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    done = subprocess.run(command[:2], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_torchx_runs_the_component(
    recipe_file: Path, small_data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    pytest.importorskip("torchx")
    torchx = [sys.executable, "-m", "torchx.cli.main"]
    component = f"{SCRIPTS / 'torchx_pretrain.py'}:pretrain"
    arguments = [
        "--recipe",
        recipe_file,
        "--data",
        small_data,
        "--run",
        tmp_path / "run",
        "-j",
        "1x2",
        "--max_retries",
        "0",
    ]
    done = subprocess.run(
        [*torchx, "run", "-s", "local_cwd", "--wait", "--log", component, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "run")) == 20


CONFIGURATION = """ClusterName=one
SlurmctldHost={host}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={port}
SlurmdPort={other}
ReturnToService=2
NodeName={host} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """One node under a slurmctld and a slurmd of its own; the environment to speak to it."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("Slurm's and munge's daemons, and root to run them, are not here")
    host = socket.gethostname().split(".")[0]
    with socket.socket() as one, socket.socket() as two:
        one.bind(("", 0))
        two.bind(("", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    (tmp_path / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, folder=tmp_path, port=ports[0], other=ports[1])
    )
    environment = environment | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemons = []
    try:
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode:
            # In the foreground, so that this one can be ended, and none that was here before.
            daemons.append(
                subprocess.Popen(
                    ["runuser", "-u", "munge", "--", "munged", "--foreground"],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            time.sleep(1)
        for name in ("slurmctld", "slurmd"):
            daemons.append(
                subprocess.Popen(
                    [name, "-D"],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            time.sleep(2)
        for _ in range(30):
            shown = subprocess.run(
                ["sinfo", "-h", "-o", "%T"],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if shown.stdout.strip() == "idle":
                break
            time.sleep(1)
        else:
            pytest.skip(f"Slurm does not run here: {shown.stdout}{shown.stderr}")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)


@pytest.mark.long
def test_slurm_requeues_a_run_whose_time_is_up(
    recipe_file: Path, small_data: Path, tmp_path: Path, slurm: dict[str, str]
) -> None:
    run = tmp_path / "run"
    one_gpu_less = [
        "--ntasks-per-node=2",
        "--gpus-per-task=0",
        "--cpus-per-task=1",
        f"--output={tmp_path}/job.log",
    ]
    script = [SCRIPTS / "train.sbatch", recipe_file, small_data, run]
    done = subprocess.run(
        ["sbatch", "--parsable", *one_gpu_less, *map(str, script), "--train.steps", "100000"],
        env=slurm,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()

    def wait_for(condition, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            log = tmp_path / "job.log"
            assert time.monotonic() < deadline, (
                log.read_text()[-3000:] if log.exists() else "the job never began"
            )
            time.sleep(0.5)

    wait_for(lambda: len(metrics(run)) > 20, 90)
    subprocess.run(
        ["scancel", "--signal=USR1", job], env=slurm, check=True
    )  # what --signal does before the time limit
    wait_for(lambda: "asking to be queued anew" in (tmp_path / "job.log").read_text(), 60)
    saved = len(metrics(run))
    assert (run / f"checkpoints/step-{saved:08d}").is_dir()
    wait_for(lambda: len(metrics(run)) > saved + 5, 240)  # Slurm itself lets two minutes pass
    assert f"from step {saved}" in (tmp_path / "job.log").read_text()
    subprocess.run(["scancel", job], env=slurm, check=True)
