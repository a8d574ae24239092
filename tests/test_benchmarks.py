"""The benchmark programs run: their smoke modes, which need no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_gpu_train_smoke(tmp_path: Path) -> None:
    printed = run("gpu_train.py", "--smoke", "--save", str(tmp_path / "r.json"))
    assert "transformers" in printed
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert {(s["compile"], s["loss"]) for s in result["sweep"]} >= {
        (True, "chunked"),
        (False, "chunked"),
        (True, "whole"),
    }
    losses = [s["final_loss"] for s in result["sweep"] if "error" not in s]
    assert len(losses) >= 4
    assert len(result["top_kernels"]) == 10


@pytest.mark.long
def test_trainer_vs_hf_smoke() -> None:
    pytest.importorskip("accelerate")
    printed = run("trainer_vs_hf.py", "--only", "smoke", "--precision", "fp32")
    (apart,) = (
        float(line.split("losses within ")[1].split(";")[0])
        for line in printed.splitlines()
        if "losses within" in line
    )
    assert apart < 1e-3
