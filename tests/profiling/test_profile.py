"""Profiles of files: what is measured, in which order, and what becomes of those that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.hardware import bandwidth
from mobilellm.hardware.energy import EnergyMeter
from mobilellm.profiling import bytes_read as profile_bytes
from mobilellm.profiling import child as profile_child
from mobilellm.profiling import device_profile
from mobilellm.profiling import profile as profiles
from mobilellm.profiling.device_profile import read_profile, write_profile
from mobilellm.profiling.operators import STEP, operators
from mobilellm.profiling.profile import profile
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.session import Runtime
from mobilellm.runtimes.table import RUNTIMES

FIGURES = {
    "load_ms": 3.0, "initialize_ms": 2.0, "first_token_ms": 10.0, "token_ms_p50": 20.0,
    "token_ms_p90": 30.0, "prefill_tokens_per_second": 640.0, "decode_tokens_per_second": 50.0,
    "peak_memory_bytes": 4096.0,
}  # fmt: skip
BANDWIDTH = {"read": 4e9, "copy": 5e9}


class Clock:
    """Time that stands still until something takes some."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowSession:
    """Takes 500 ms to open, 7 ms for its first run, then 1 ms a token; each tenth 5 ms more."""

    vocab_size, end_tokens = 50, ()

    def __init__(self, clock: Clock, context: int | None) -> None:
        clock.now += 0.5
        self.clock, self.context, self.fed = clock, context or 0, []
        self.held = 0

    def feed(self, ids: list[int]) -> np.ndarray:
        assert self.held + len(ids) <= self.context
        self.held += len(ids)
        self.clock.now += (7 if not self.fed else len(ids)) / 1000
        self.fed.append(list(ids))
        decoded = sum(len(ids) == 1 for ids in self.fed) - 1
        if len(ids) == 1 and decoded and decoded % 10 == 0:
            self.clock.now += 0.005
        return np.eye(self.vocab_size)[(ids[-1] + 1) % self.vocab_size]

    def reset(self) -> None:
        self.held = 0

    def close(self) -> None:
        raise AssertionError("the process ends instead")


def test_each_figure_is_of_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, opened = Clock(), []

    def open_it(path: Path, context: int | None, threads: int | None) -> SlowSession:
        opened.append((SlowSession(clock, context), context, threads))
        return opened[0][0]

    runtime = SimpleNamespace(package="json", imports=(), open=open_it)
    monkeypatch.setattr(profile_child, "time", clock)
    monkeypatch.setitem(profile_child.RUNTIMES, "slow", runtime)
    found = profile_child.measure(Path("x"), "slow", prompt=16, generate=20, threads=3)
    figures = found["figures"]
    peak = figures.pop("peak_memory_bytes")
    assert 0 <= peak < 64 << 20
    figures.pop("joules_per_token", None)
    assert figures == pytest.approx(
        {
            "load_ms": 500,
            "initialize_ms": 7,
            "first_token_ms": 16,
            "prefill_tokens_per_second": 1000,
            "decode_tokens_per_second": 20 / 0.030,
            "token_ms_p50": 1,
            "token_ms_p90": 1.5,  # two of twenty took 6 ms: between the 18th and the 19th
        }
    )
    session, context, threads = opened[0]
    assert (context, threads) == (36, 3)
    prompts = [ids for ids in session.fed if len(ids) == 16]
    assert prompts[0] == prompts[1] == profile_child.prompt_of(16, 50)
    # What is written is the likeliest token each time.
    assert session.fed[3:] == [[(prompts[0][-1] + 1 + i) % 50] for i in range(20)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests to child processes, which are answered at once: a third slower each time."""
    found: list[dict[str, Any]] = []

    def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
        found.append(request | {"threads": threads})
        if request["kind"] == "bandwidth":
            return {"figures": dict(BANDWIDTH)}
        number = sum(r.get("file") == request["file"] for r in found)
        return {"figures": {key: value * number for key, value in FIGURES.items()}}

    monkeypatch.setattr(profiles, "ask", ask)
    return found


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [checkpoint(tmp_path / name, network()) for name in ("a", "b")]


def test_all_files_take_turns(asked: list[dict[str, Any]], models: list[Path]) -> None:
    steps: list[tuple[float, float]] = []
    found = profile(
        models, prompt=8, generate=4, repeats=3, threads=2,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert [r.get("file") for r in asked] == [None, *map(str, models)] * 3
    assert {r["threads"] for r in asked} == {2}
    assert steps == [(i + 1, 9) for i in range(9)]
    assert found["settings"] == {"prompt": 8, "generate": 4, "repeats": 3, "threads": 2}
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
    load = found["rows"][1]["figures"]["load_ms"]
    assert load == {"median": 6.0, "lowest": 3.0, "highest": 9.0, "values": [3.0, 6.0, 9.0]}
    assert found["rows"][0]["runtime_version"] == torch.__version__.split("+")[0] or "+" in str(
        found["rows"][0]["runtime_version"]
    )


def test_the_share_of_the_bound_is_by_the_faster_way_of_memory(
    monkeypatch: pytest.MonkeyPatch, models: list[Path]
) -> None:
    def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
        if request["kind"] == "bandwidth":
            return {"figures": dict(BANDWIDTH)}
        return {"figures": dict(FIGURES), "weight_bytes": 1_000_000, "cache_number_bytes": 2}

    monkeypatch.setattr(profiles, "ask", ask)
    (row,) = profile(models[:1], prompt=8, generate=4, repeats=1)["rows"]
    config = network().config
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert row["bytes_per_token"] == 1_000_000 + 10 * cache  # 10 positions before the middle token
    assert row["bandwidth_share"] == pytest.approx(row["bytes_per_token"] * 50 / 5e9)


def stand_in(folder: Path, script: str) -> str:
    """A program in place of the Python of the child processes; $3 is the request, $4 the file
    descriptor of the answer."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


GOOD = f"echo '{json.dumps({'figures': FIGURES | BANDWIDTH})}' >&$4"


def test_a_runtime_that_crashes_is_a_row_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[Path]
) -> None:
    script = f"""case "$3" in
*{models[0].name}\\"*) echo x >> {tmp_path}/crashes; echo 'GGML_ASSERT failed' >&2; kill -SEGV $$;;
*) {GOOD};;
esac"""
    monkeypatch.setattr(profiles.sys, "executable", stand_in(tmp_path, script))
    said: list[str] = []
    found = profile(models, prompt=8, generate=4, repeats=3, say=said.append)
    bad, good = found["rows"]
    assert bad["error"] == "its process was killed by SIGSEGV: GGML_ASSERT failed"
    assert bad["figures"] == {}
    assert bad["bytes_per_token"] is None
    assert len(good["figures"]["load_ms"]["values"]) == 3
    assert good["error"] is None
    assert len(said) == 1
    assert (tmp_path / "crashes").read_text() == "x\n"  # it is not tried again
    assert not found["interrupted"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -KILL $$", "killed by SIGKILL, as the system does when memory runs out"),
        ("echo first; echo last >&2; exit 3", "its process ended with status 3: last"),
        ("exit 0", "its process ended with status 0"),
        ("echo '[1]' >&$4", "no answer"),
    ],
)
def test_how_a_process_died_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str
) -> None:
    monkeypatch.setattr(profiles.sys, "executable", stand_in(tmp_path, script))
    assert words in profiles.ask({"kind": "bandwidth"}, 1)["error"]


def test_after_ctrl_c_the_finished_repeats_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: list[Path]
) -> None:
    script = f"""echo x >> {tmp_path}/turns
if [ $(wc -l < {tmp_path}/turns) = 6 ]; then
    echo $$ > {tmp_path}/pid; sleep 0.5; kill -INT $PPID; sleep 60
fi
{GOOD}"""
    monkeypatch.setattr(profiles.sys, "executable", stand_in(tmp_path, script))
    found = profile(models, prompt=8, generate=4, repeats=5)
    assert found["interrupted"]
    assert [len(row["figures"]["load_ms"]["values"]) for row in found["rows"]] == [2, 1]
    with pytest.raises(ProcessLookupError):  # the one at work was ended
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_file_without_a_finished_repeat_has_no_row(
    monkeypatch: pytest.MonkeyPatch, models: list[Path]
) -> None:
    def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
        if request.get("file") == str(models[1]):
            raise KeyboardInterrupt
        return {"figures": FIGURES | BANDWIDTH}

    monkeypatch.setattr(profiles, "ask", ask)
    found = profile(models, prompt=8, generate=4, repeats=5)
    assert [row["name"] for row in found["rows"]] == ["a"]


def test_when_all_files_are_refused_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, models: list[Path]
) -> None:
    def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
        return {"error": f"{request.get('file')}: too short", "hint": "mend it", "user": True}

    monkeypatch.setattr(profiles, "ask", ask)
    with pytest.raises(UserError) as caught:
        profile(models, repeats=2)
    assert str(caught.value) == f"{models[0]}: too short; mend it"


def test_a_real_process_measures_and_what_it_refuses_is_in_its_words(tmp_path: Path) -> None:
    """One start of Python is most of this test's time."""
    model = checkpoint(tmp_path / "m", network())
    request = {"kind": "speed", "file": str(model), "runtime": "mobilellm"}
    found = profiles.ask(request | {"prompt": 16, "generate": 8}, 1)
    assert set(FIGURES) <= set(found["figures"])
    assert all(value > 0 for value in found["figures"].values())
    assert found["weight_bytes"] == 4 * sum(p.numel() for p in network().parameters())
    answer = profile_child.answer(request | {"prompt": 100, "generate": 100, "threads": 1})
    assert answer["user"]
    assert "128 positions" in answer["error"]


def test_imports_are_no_part_of_the_load(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m", network())
    program = (
        "import importlib, pathlib, sys, mobilellm.profiling.child as child\n"
        "entry = child.RUNTIMES['mobilellm']\n"
        "for name in (entry.package, *entry.imports): importlib.import_module(name)\n"
        "before = set(sys.modules)\n"
        "entry.open(pathlib.Path(sys.argv[1]), 8, 1)\n"
        "print([n for n in set(sys.modules) - before if n.startswith('torch.')])"
    )
    command = [sys.executable, "-c", program, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_runtime_raises_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_it(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setitem(
        profile_child.RUNTIMES, "bad", SimpleNamespace(package="json", imports=(), open=open_it)
    )
    request = {"kind": "speed", "file": "x", "runtime": "bad", "prompt": 1, "generate": 1}
    answer = profile_child.answer(request | {"threads": torch.get_num_threads()})
    assert answer == {"error": "RuntimeError: first", "hint": "", "user": False}


@pytest.mark.parametrize("kind", ["own", "first"])
def test_a_shared_block_is_read_once(kind: str) -> None:
    from mobilellm.runtimes.ours import NetworkSession

    shared = network(layer_repeats=2, shared_kv=kind)
    found = profile_child.own_bytes(NetworkSession(shared))
    assert found["weight_bytes"] == 4 * sum(p.numel() for p in shared.parameters())
    assert found["cache_number_bytes"] == 4
    facts = profile_bytes.model_facts(shared.config)
    assert facts["read_parameters"] * 4 == found["weight_bytes"]
    assert facts["applied_parameters"] > facts["read_parameters"]


def test_an_embedding_of_its_own_is_not_read() -> None:
    from mobilellm.runtimes.ours import NetworkSession

    untied = network(tie_word_embeddings=False)
    found = profile_child.own_bytes(NetworkSession(untied))
    less = untied.embed_tokens.weight.numel()
    assert found["weight_bytes"] == 4 * (sum(p.numel() for p in untied.parameters()) - less)
    assert profile_bytes.read_parameters(untied.config) * 4 == found["weight_bytes"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_gguf_file_are_its_tensors(tmp_path: Path, tied: bool) -> None:
    gguf = pytest.importorskip("gguf")
    from mobilellm.workflows.convert import convert

    model = checkpoint(tmp_path / "m", network(tie_word_embeddings=tied))
    convert(model, tmp_path / "m.gguf", "gguf", precision="F16", verify=False)
    tensors = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    if not tied:
        del tensors["token_embd.weight"]
    assert profile_bytes.weights_in(tmp_path / "m.gguf") == sum(tensors.values())
    config = profile_bytes.config_of(tmp_path / "m.gguf")
    assert config is not None
    assert config.hidden_size == network().config.hidden_size


def test_a_runtime_is_chosen_for_each_file(models: list[Path]) -> None:
    assert [c.runtime.name for c in profiles.contestants(models)] == ["mobilellm"] * 2
    with pytest.raises(UserError, match="unknown runtime 'mobilelm'"):
        profiles.contestants(models, ["mobilelm"])
    with pytest.raises(UserError, match="the same file is given twice"):
        profiles.contestants([models[0], models[0]])
    with pytest.raises(UserError, match="no such file"):
        profiles.contestants([Path("absent.gguf")])


def fake_runtime(name: str, package: str = "json") -> Runtime:
    return Runtime(
        name=name, what=name, package=package, extra="x", recognizes=lambda path: True,
        open=lambda *_: None, read_tokenizer=lambda path: None,  # type: ignore[arg-type, return-value]
    )  # fmt: skip


def test_every_installed_runtime_but_ours_takes_part(
    monkeypatch: pytest.MonkeyPatch, models: list[Path]
) -> None:
    for runtime in (fake_runtime("one"), fake_runtime("two"), fake_runtime("three", "no_such")):
        monkeypatch.setitem(profiles.RUNTIMES, runtime.name, runtime)

    def names(*wanted: str) -> set[str]:
        return {c.runtime.name for c in profiles.contestants(models[:1], wanted)}

    assert {"one", "two"} <= names()
    assert not {"mobilellm", "three"} & names()
    assert names("mobilellm", "two") == {"mobilellm", "two"}
    with pytest.raises(UserError, match=r"three is not installed \(no_such\)"):
        names("three")


def test_a_profile_is_read_as_it_was_written(
    asked: list[dict[str, Any]], models: list[Path], tmp_path: Path
) -> None:
    made = profile(models, prompt=8, generate=4, repeats=2)
    write_profile(tmp_path / "p.json", made)
    assert read_profile(tmp_path / "p.json") == made
    assert made["rows"][0]["sha256"] == made["rows"][1]["sha256"] != ""  # the same weights
    (models[0] / "model.safetensors").write_bytes(b"other")
    again = profile(models, prompt=8, generate=4, repeats=2)
    assert again["rows"][0]["sha256"] != made["rows"][0]["sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "of format 2, 1 is read; measure again"),
        ({"format_version": "x" * 99}, "of format x"),
        ({"format": "other"}, "not a device profile"),
        ({"rows": {}}, "rows is {}, must be a list"),
        ({"rows": [1]}, r"rows\[0\] is 1, must be an object"),
        ({"rows": [{"name": "x"}]}, r"rows\[0\].file is missing"),
        ({"bandwidth": {"read": 1}}, "bandwidth.read is 1, must be an object"),
        ({"settings": None}, "settings is None, must be an object"),
    ],
)
def test_another_versions_profile_and_a_damaged_one_are_one_line(
    asked: list[dict[str, Any]],
    models: list[Path],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    made = dict(profile(models, prompt=8, generate=4, repeats=1)) | change
    (tmp_path / "p.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=message) as caught:
        read_profile(tmp_path / "p.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_row_that_was_altered_or_cut_off_is_one_line(
    asked: list[dict[str, Any]], models: list[Path], tmp_path: Path
) -> None:
    made = profile(models[:1], prompt=8, generate=4, repeats=1)
    text = json.dumps(made)
    for key in ("name", "bytes", "figures", "error", "model", "bytes_per_token"):
        broken = json.loads(text)
        broken["rows"][0][key] = [1]
        (tmp_path / "p.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match="damaged"):
            read_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text(text[:-20])
    with pytest.raises(UserError, match="broken JSON"):
        read_profile(tmp_path / "p.json")


def test_bandwidth_counts_both_ways_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_best", lambda work, seconds: 0.5)
    found = bandwidth.memory_bandwidth(0.0, array_bytes=1 << 20)
    assert found == {"read": 2 << 20, "copy": 4 << 20}


def test_bandwidth_is_measured() -> None:
    found = bandwidth.memory_bandwidth(0.0, array_bytes=8 << 20)
    assert set(found) == {"read", "copy"}
    assert min(found.values()) > 1e7


def test_caches_are_read_and_instructions_left_out(tmp_path: Path) -> None:
    for i, (kind, level, size) in enumerate(
        [("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M"), ("Unified", 3, "?")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", str(level)), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert bandwidth.cache_bytes(tmp_path) == {"L1": 48 << 10, "L2": 2 << 20}
    assert bandwidth.cache_bytes(tmp_path / "absent") == {}


def test_energy_is_of_all_packages_and_a_counter_may_begin_anew(tmp_path: Path) -> None:
    def write(package: int, joules: int) -> None:
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{joules}000000\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")

    write(0, 90)
    write(1, 5)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first package
    meter = EnergyMeter(tmp_path)
    before = meter.joules()
    write(0, 10)
    write(1, 8)
    assert meter.since(before) == pytest.approx(20 + 3)
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    assert meter.joules() is None
    assert meter.since(before) is None
    assert EnergyMeter(tmp_path / "absent").joules() is None


def test_what_is_measured_is_what_is_described() -> None:
    assert set(FIGURES) | {"joules_per_token"} == set(device_profile.FIGURES)


def test_operators_are_those_of_our_network_and_others_do_not_tell() -> None:
    session = NetworkSession(network(vocab_size=64), 32)
    rows = operators(session, [1, 2, 3, 4])
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    for phase in ("prefill", "decode"):
        found = [row for row in rows if row["phase"] == phase]
        assert 0 < sum(row["share"] for row in found) <= 1 + 1e-9
        names = {row["name"] for row in found}
        if phase == "decode" and session.decoder is not None:
            assert STEP in names
        else:
            assert any("linear" in name or "mm" in name for name in names)
        assert all(row["ms"] > 0 and row["calls"] > 0 for row in found)
    with pytest.raises(UserError, match="does not tell"):
        operators(object(), [1])


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai", "executorch"])
def test_a_folder_counts_as_the_file_that_is_run(tmp_path: Path, runtime: str) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/model.onnx").write_bytes(bytes(5000))
    (tmp_path / "onnx/model_q4.onnx").write_bytes(bytes(700))
    (tmp_path / "m.pte").write_bytes(bytes(900))
    decoder = {"decoder": {"filename": "onnx/model_q4.onnx"}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": decoder}))
    one = profiles.Contestant("m", tmp_path, RUNTIMES[runtime], repeats=[FIGURES])
    row = profiles.row(one, 16, 4, 1e6)
    size = 900 if runtime == "executorch" else 700
    assert row["bytes"] == row["bytes_per_token"] == size
    assert row["bandwidth_share"] == pytest.approx(size * 50 / 1e6)


def test_settings_that_name_a_file_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    for said in ("../secret", "onnx/absent", 3, None):
        decoder = {"decoder": {"filename": said}}
        (tmp_path / "m/genai_config.json").write_text(json.dumps({"model": decoder}))
        with pytest.raises(UserError, match="genai_config"):
            RUNTIMES["onnxruntime-genai"].file_of(tmp_path / "m")
