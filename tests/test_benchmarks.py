"""The benchmark programs run: their smoke modes, which need no GPU."""

import importlib.util
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
    assert len(result["kernels"]["top"]) >= 10
    assert sum(result["kernels"]["milliseconds_a_step"].values()) > 0


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


@pytest.mark.long
def test_device_smoke(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    only = ("--only", "fp32", "bf16", "int4", "f32.gguf", "bf16.gguf", "q4_0.gguf")
    run("device.py", "--smoke", *only, "--save", str(tmp_path / "r.json"))
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {row["name"]: row for row in result["profile"]["rows"]}
    assert set(rows) == set(only[1:])
    assert [row["error"] for row in rows.values()] == [None] * 6
    assert str(tmp_path.parent) not in json.dumps(result["profile"]["rows"])
    pairs = [("fp32", "f32.gguf"), ("bf16", "bf16.gguf"), ("int4", "q4_0.gguf")]
    assert [(aim["ours"][0], aim["theirs"][0]) for aim in result["aims"]] == pairs
    held = {name: rows[name]["bytes_per_token"] for name, _ in pairs}
    assert held["bf16"] < 0.6 * held["fp32"]
    assert held["int4"] < 0.4 * held["fp32"]
    aim = result["aims"][0]
    key = "decode_tokens_per_second"
    ours, theirs = (rows[name]["figures"][key]["median"] for name in ("fp32", "f32.gguf"))
    assert aim["ratio"] == pytest.approx(ours / theirs)
    assert aim["holds"] == (ours >= theirs)


@pytest.mark.long
def test_schema_calls(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("jsonschema")
    from mobilellm.tokenizer.tokenizer import train_bpe

    train_bpe(["the fox and the hen"], 300).save(tmp_path)
    save = tmp_path / "r.json"
    run("schema_calls.py", "--tokenizer", str(tmp_path), "--calls", "11", "--save", str(save))
    found = json.loads(save.read_text())
    assert found["valid_held"] == found["calls"] == 11
    assert found["valid_free"] == 0


@pytest.mark.long
def test_post_training_smoke(tmp_path: Path) -> None:
    only = ["sft", "kd"]
    if importlib.util.find_spec("trl") is not None:
        only.append("trl")
    where = ("--work", str(tmp_path / "w"), "--save", str(tmp_path / "r.json"))
    run("post_training.py", "--smoke", *where, "--only", *only)
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["sft"]["speed_over_text"] > 0
    assert len(results["kd"]["held_out_bits_per_byte"]["alone"]) == 3
    assert 120 < results["kd"]["cache"]["bytes_a_token"] < 131
    if "trl" in results:
        assert results["trl"]["largest_loss_difference"] < 1e-3
