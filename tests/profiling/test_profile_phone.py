"""Profiles on a phone: commands and their parsing, against a stand-in for adb.

The stand-in copies what is pushed into a folder that plays the phone, and runs commands there by
`sh`, as a phone's shell would: what is quoted wrongly has its effect. The outputs of the programs
are of the form that their makers' documentation shows.
"""

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.interop.networks import checkpoint, network

from mobilellm import cli
from mobilellm.errors import UserError
from mobilellm.profiling import phone_profile as phones
from mobilellm.profiling.device_profile import read_profile, write_profile

ADB = f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys
root = pathlib.Path(os.environ["PHONE"])
words = sys.argv[1:]
with open(root / "calls.txt", "a") as log:
    log.write(repr(words) + "\\n")
if words[0] == "-s":
    if words[1] != "good; serial":
        sys.exit(f"error: device '{{words[1]}}' not found")
    words = words[2:]
def here(path):
    return path.replace("/data/local/tmp", str(root))
if words[0] == "get-state":
    print((root / "state").read_text() if (root / "state").exists() else "device")
elif words[0] == "push":
    shutil.copy(words[1], here(words[2]))
elif words[0] == "shell":
    properties = 'getprop() {{ case $1 in ro.product.model) printf "Phone\\\\033[2J";; esac; }};'
    done = subprocess.run(["sh", "-c", properties + here(" ".join(words[1:]))], cwd=root)
    sys.exit(done.returncode)
"""
BENCH = json.dumps(
    [
        {"build_commit": "x", "n_prompt": 8, "n_gen": 0, "avg_ts": 410.0,
         "samples_ns": [20_000_000, 19_000_000], "samples_ts": [400.0, 421.0]},
        {"build_commit": "x", "n_prompt": 0, "n_gen": 4, "avg_ts": 51.0,
         "samples_ns": [80_000_000, 78_000_000], "samples_ts": [50.0, 51.3]},
    ]
)  # fmt: skip
OBSERVED = (
    'I 00:00:00 main.cpp] warm\nPyTorchObserver {"prompt_tokens":8,"generated_tokens":4,'
    '"model_load_start_ms":100,"model_load_end_ms":150,"inference_start_ms":150,'
    '"inference_end_ms":400,"prompt_eval_end_ms":250,"first_token_ms":260,'
    '"aggregate_sampling_time_ms":1,"SCALING_FACTOR_UNITS_PER_SECOND":1000}\nPyTorchObserver '
    '{"prompt_tokens":8,"generated_tokens":4,"model_load_start_ms":0,"model_load_end_ms":0,'
    '"inference_start_ms":400,"inference_end_ms":500,"prompt_eval_end_ms":420,'
    '"first_token_ms":440,"aggregate_sampling_time_ms":1,"SCALING_FACTOR_UNITS_PER_SECOND":1000}'
)
PERF = """Setting intra_op_num_threads to 2
Session creation time cost: 0.25 s
First inference time cost: 90 ms
Total inference time cost: 0.1 s
Average inference time cost total: 20.000000 ms
Peak working set size: 91336704 bytes
Min Latency: 0.016 s
Max Latency: 0.032 s
P50 Latency: 0.02 s
P90 Latency: 0.03 s
"""


class Device:
    """The stand-in's phone: what was called, and what lies on it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def calls(self) -> list[list[str]]:
        return [ast.literal_eval(line) for line in (self.root / "calls.txt").open()]

    def left(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if p.name not in ("calls.txt", "state"))


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/adb").write_text(ADB)
    (tmp_path / "bin/adb").chmod(0o755)
    (tmp_path / "phone").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PHONE", str(tmp_path / "phone"))
    return Device(tmp_path / "phone")


@pytest.fixture
def runners(tmp_path: Path) -> Path:
    folder = tmp_path / "runners"
    folder.mkdir()
    for name, output in (
        ("llama-bench", BENCH), ("llama_main", OBSERVED), ("onnxruntime_perf_test", PERF)
    ):  # fmt: skip
        script = f"#!/bin/sh\necho \"$0 $*\" > ../last-{name}\ncat <<'END'\n{output}\nEND\n"
        (folder / name).write_text(script)  # not executable: a phone's chmod makes it so
    (folder / "lib one;.so").write_text("library")
    return folder


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "a'; touch pwned; '$(touch pwned).gguf"
    path.write_bytes(b"GGUF")
    return path


def profile(files: list[Path], runners: Path, **settings: object) -> dict:
    values = {"prompt": 8, "generate": 4, "repeats": 2, "threads": 2} | settings
    return phones.profile_phone(files, runners=runners, **values)  # type: ignore[arg-type, return-value]


def test_a_gguf_file_is_measured_by_llama_bench(
    device: Device, runners: Path, gguf: Path, tmp_path: Path
) -> None:
    found = profile([gguf], runners)
    (row,) = found["rows"]
    assert row["error"] is None
    assert row["runtime"] == "llama.cpp"
    figures = {key: value["values"] for key, value in row["figures"].items()}
    assert figures == {
        "first_token_ms": [20.0, 19.0],
        "prefill_tokens_per_second": [400.0, 421.0],
        "decode_tokens_per_second": [50.0, 51.3],
    }
    said = (device.root / "last-llama-bench").read_text().strip()
    assert said == "./llama-bench -m model.gguf -p 8 -n 4 -r 2 -t 2 -o json"
    assert found["machine"]["device"] == "Phone␛[2J"  # its text is no command to a terminal
    write_profile(tmp_path / "p.json", found)  # type: ignore[arg-type]
    assert read_profile(tmp_path / "p.json") == found


def test_no_name_is_read_as_a_command_and_nothing_is_left(
    device: Device, runners: Path, gguf: Path
) -> None:
    profile([gguf], runners, serial="good; serial")
    assert device.left() == ["last-llama-bench"]
    assert not list(gguf.parent.rglob("pwned"))
    assert {tuple(call[:2]) for call in device.calls} == {("-s", "good; serial")}
    pushed = {Path(call[4]).name for call in device.calls if call[2] == "push"}
    assert pushed == {"lib_one_.so", "llama-bench", "model.gguf"}
    folders = {call[4].split("/")[4] for call in device.calls if call[2] == "push"}
    assert len(folders) == 1
    assert folders.pop().startswith("mobilellm-")


def test_a_pte_file_is_measured_by_llama_main(
    device: Device, runners: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.pte").write_bytes(b"ET12")
    (row,) = profile([tmp_path / "m.pte"], runners)["rows"]
    assert "no tokenizer.json" in row["error"]
    (tmp_path / "tokenizer.json").write_text("{}")
    (row,) = profile([tmp_path / "m.pte"], runners)["rows"]
    figures = {key: value["values"] for key, value in row["figures"].items()}
    assert figures == {
        "load_ms": [50.0] * 2,
        "first_token_ms": [20.0] * 2,
        "prefill_tokens_per_second": [400.0] * 2,
        "decode_tokens_per_second": [50.0] * 2,
    }
    said = (device.root / "last-llama_main").read_text().strip()
    assert said == (
        "./llama_main --model_path=model.pte --tokenizer_path=tokenizer.json --prompt="
        + "one " * 8
        + " --seq_len=12 --cpu_threads=2 --temperature=0 --warmup=true"
    )


def test_an_onnx_file_is_measured_with_inputs_of_its_shape(
    device: Device, runners: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "m", network())
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"x")
    (row,) = profile([folder / "onnx/model.onnx"], runners)["rows"]
    assert row["error"] is None
    figures = {key: (v["median"], v["lowest"], v["highest"]) for key, v in row["figures"].items()}
    assert figures == {
        "load_ms": (250, 250, 250),
        "initialize_ms": (90, 90, 90),
        "first_token_ms": (20, 16, 32),
        "prefill_tokens_per_second": (400, 250, 500),
        "decode_tokens_per_second": (50, 31.25, 62.5),
        "token_ms_p50": (20, 16, 32),
        "token_ms_p90": (30, 16, 32),
        "peak_memory_bytes": (91336704,) * 3,
    }
    said = (device.root / "last-onnxruntime_perf_test").read_text().strip()
    assert said == "./onnxruntime_perf_test -e cpu -m times -r 4 -s -x 2 model.onnx"
    pushes = [Path(call[2]) for call in device.calls if call[0] == "push"]
    sets = [path for path in pushes if path.parent.name == "test_data_set_0"]
    slots = network().config.num_hidden_layers
    assert len(sets) == 2 * (2 + 2 * slots)
    assert row["model"]["executed_layers"] == slots


def test_tensors_are_as_onnx_reads_them() -> None:
    onnx = pytest.importorskip("onnx")
    found = {}
    for data in phones.inputs((2, 3, 16), new=5, past=300):
        proto = onnx.TensorProto()
        proto.ParseFromString(data)
        found[proto.name] = onnx.numpy_helper.to_array(proto)
    assert set(found) == {"input_ids", "attention_mask"} | {
        f"past_key_values.{slot}.{part}" for slot in range(2) for part in ("key", "value")
    }
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert found["attention_mask"].dtype == np.int64
    assert found["attention_mask"].tolist() == [[1] * 305]
    assert found["past_key_values.1.value"].shape == (1, 3, 300, 16)
    assert found["past_key_values.1.value"].dtype == np.float32


def test_a_program_that_fails_is_a_row_and_the_others_go_on(
    device: Device, runners: Path, gguf: Path, tmp_path: Path
) -> None:
    (runners / "llama_main").write_text("#!/bin/sh\nprintf 'no \\033[31mGPU\\n'; exit 3\n")
    (tmp_path / "m.pte").write_bytes(b"ET12")
    (tmp_path / "tokenizer.model").write_text("x")
    bad, good = profile([tmp_path / "m.pte", gguf], runners)["rows"]
    assert bad["error"] == "no ␛[31mGPU"
    assert good["error"] is None
    (runners / "llama-bench").write_text("#!/bin/sh\necho 'nothing'\n")
    (row,) = profile([gguf], runners)["rows"]
    assert "llama-bench printed no figures" in row["error"]
    assert not [name for name in device.left() if name.startswith("mobilellm")]


def test_after_ctrl_c_the_phone_is_cleaned_up(
    device: Device, runners: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(
        phones.RUNNERS, ".gguf", phones.PhoneRunner("llama.cpp", "llama-bench", interrupt)  # type: ignore[arg-type]
    )  # fmt: skip
    found = profile([gguf], runners)
    assert found["interrupted"]
    assert found["rows"] == []
    assert device.left() == []


def test_bad_input_is_a_users_error(
    device: Device, runners: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"adb: error: device 'other' not found"):
        profile([gguf], runners, serial="other")
    with pytest.raises(UserError, match="no such file"):
        profile([tmp_path / "absent.gguf"], runners)
    with pytest.raises(UserError, match="no program for such a file"):
        profile([runners / "lib one;.so"], runners)
    with pytest.raises(UserError, match="no llama-bench in it"):
        profile([gguf], tmp_path)
    (device.root / "state").write_text("unauthorized")
    with pytest.raises(UserError, match="in state 'unauthorized'"):
        profile([gguf], runners)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="adb is not on the PATH"):
        profile([gguf], runners)


def test_the_command_line_measures_on_the_phone(
    device: Device, runners: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--adb", "--runners", str(runners), "--prompt", "8", "--generate", "4")
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", str(gguf), *settings, "--repeats", "2"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    assert "Phone␛[2J, 4 threads" in out
    assert "50.6" in out
    for flags in (["--serial", "x"], ["--adb"], [*settings, "--operators"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["profile", str(gguf), *flags])
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_says_that_it_was_not_tried_on_a_phone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    assert "not on a phone" in " ".join(capsys.readouterr().out.replace("│", " ").split())
