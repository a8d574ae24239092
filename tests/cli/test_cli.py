"""The command line as a user meets it: help, JSON, exit statuses, one-line errors."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.command_line import call

from mobilellm.cli.verbs import VERBS

TRAIN = [
    sys.executable,
    "-m",
    "mobilellm",
    "train",
    "--model.preset",
    "1M",
    "--train.batch-tokens",
    "256",
]
TRAIN += ["--train.log-every", "1", "--train.compile", "off"]


def run(
    *arguments: object, cwd: Path | None = None, status: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobilellm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart run of a few steps on a small text of its own."""
    folder = tmp_path_factory.mktemp("demo")
    lines = (f"Line {i}: the quick brown fox jumps over the lazy dog.\n" for i in range(800))
    (folder / "text.txt").write_text("".join(lines))
    settings = ("--steps", 12, "--preset", "1M", "--vocab-size", 300)
    run("quickstart", "--text", "text.txt", "--out", "runs/demo", *settings, cwd=folder)
    return folder / "runs/demo"


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mobilellm import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'transformers', 'tokenizers', 'safetensors')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout[-200:]
    for verb in VERBS:
        assert verb in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself_with_defaults(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    out, _ = call(capsys, verb, "--help")
    assert "default" in out
    assert "Example" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"mobilellm \d+\.\d+\.\d+\n", call(capsys, "--version")[0])


def test_info_keys_that_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(call(capsys, "info", "125M", "--json")[0])
    assert facts["parameters"]["total"] == 124_635_456
    assert facts["parameters"]["embedding"] == 18_432_000
    assert facts["flops_per_token"]["six_n"] == 6 * 124_635_456
    assert facts["flops_per_token"]["palm"] > facts["flops_per_token"]["six_n"]
    assert facts["kv_cache_bytes_per_token"] == 23_040
    assert "124,635,456" in call(capsys, "info", "125M")[0]
    assert "350M-LS" in call(capsys, "info")[0]


def test_quickstart_leaves_a_whole_run(demo: Path) -> None:
    names = {p.name for p in demo.iterdir()}
    assert {
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "report.html",
        "checkpoints",
    } <= names
    result = json.loads((demo / "result.json").read_text())
    assert result["held_out"]["bits_per_byte"] > 0
    assert set(result["baselines"]) >= {"unigram", "gzip", "xz"}
    assert len(result["samples"]) == 3
    assert (demo.parent / "demo-data/manifest.json").is_file()
    rows = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= set(
        rows[0]
    )


def test_quickstart_again_shows_what_is_there(demo: Path) -> None:
    before = (demo / "result.json").stat().st_mtime_ns
    done = run("quickstart", "--out", demo, "--text", demo.parent.parent / "text.txt")
    assert "finished already" in done.stderr
    assert "bits a byte" in done.stdout
    # Where its engine cannot be had, a line says so in the place of the page.
    page = f"page      {demo / 'demo.html'}" in done.stdout
    assert page == (demo / "demo.html").is_file()
    assert page != ("without the page" in done.stderr)
    assert (demo / "result.json").stat().st_mtime_ns == before


def test_quickstart_does_not_take_one_texts_tokens_for_anothers(
    capsys: pytest.CaptureFixture[str], demo: Path
) -> None:
    _, err = call(capsys, "quickstart", "--out", demo, status=2)
    assert "made from another text" in err


def test_eval_keys_and_agreement_with_training(
    capsys: pytest.CaptureFixture[str], demo: Path
) -> None:
    score = json.loads(call(capsys, "eval", demo, "--json")[0])
    assert {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"} == set(score)
    trained = json.loads((demo / "result.json").read_text())["held_out"]
    assert score["tokens"] == trained["tokens"]
    assert score["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    checkpoint = next((demo / "checkpoints").iterdir())
    assert json.loads(call(capsys, "eval", checkpoint, "--json")[0]) == score


def test_eval_on_a_text(capsys: pytest.CaptureFixture[str], demo: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("the quick brown fox é")
    score = json.loads(call(capsys, "eval", demo, "--text", tmp_path / "x.txt", "--json")[0])
    assert score["bytes"] == 22


def test_generate_is_seeded_and_continues_the_prompt(
    capsys: pytest.CaptureFixture[str], demo: Path
) -> None:
    arguments = ("generate", demo, "--prompt", "Line 5: the", "--max-new-tokens", 12, "--seed", 3)
    text = call(capsys, *arguments)[0]
    assert text.startswith("Line 5: the")
    assert call(capsys, *arguments)[0] == text
    facts = json.loads(call(capsys, *arguments, "--json")[0])
    assert facts["prompt"] + facts["text"] + "\n" == text
    assert len(facts["tokens"]) <= 12


def test_prepare_and_train_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("All happy families are alike. " * 300)
    data, target = tmp_path / "d", tmp_path / "run"
    arguments = ("--out", data, "--vocab-size", 280, "--held-out", 0.1, "--json")
    manifest = json.loads(call(capsys, "prepare", tmp_path / "t.txt", *arguments)[0])
    assert manifest["splits"]["train"]["tokens"] > 100
    recipe = '[model]\npreset = "1M"\n[data]\nsequence_length = 16\n'
    recipe += "[train]\nsteps = 5\nbatch_tokens = 64\n"
    (tmp_path / "r.toml").write_text(recipe)
    out, _ = call(
        capsys,
        "train",
        tmp_path / "r.toml",
        "--data.path",
        data,
        "--out",
        target,
        "--train.steps",
        3,
        "--json",
    )
    facts = json.loads(out)
    assert (facts["step"], facts["interrupted"]) == (3, None)
    assert facts["held_out"]["bits_per_byte"] > 0
    assert (target / "report.html").is_file()
    _, err = call(capsys, "train", "--resume", target, "--train.steps", 9, status=2)
    assert "train.steps is 3 there, 9 here" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "126M"], ["unknown model '126M'", "did you mean"]),
        (["eval", "nowhere", "--text", "x"], ["nowhere"]),
        (["generate", "nowhere"], ["nowhere"]),
        (["prepare", "nowhere.txt", "--out", "d"], ["nowhere.txt: no such file"]),
        (["train"], ["--out"]),
        (["train", "none.toml", "--out", "r"], ["none.toml: no such recipe"]),
        (["train", "--out", "r"], ["data.path"]),
        (["quickstart", "--minutes", "0"], ["--minutes 0"]),
        (["quickstart", "--text", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = call(capsys, *arguments, status=2)
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("info", "126M", "--debug", status=1).stderr


def test_an_unknown_flag_is_status_2() -> None:
    assert "--train.stepz" in run("train", "--train.stepz", 5, status=2).stderr


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, small_data: Path) -> None:
    command = [*TRAIN, "--data.path", str(small_data), "--train.steps", "100000", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: mobilellm train --resume run" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_a_terminal_sees_a_progress_bar_and_a_pipe_does_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small_data: Path
) -> None:
    command = [*TRAIN, "--data.path", str(small_data), "--train.steps", "12"]
    parent, child = pty.openpty()
    wide = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "a")], stderr=child, stdout=subprocess.DEVNULL, env=wide
    )
    os.close(child)
    seen = b""
    try:
        while piece := os.read(parent, 65536):
            seen += piece
    except OSError:  # Linux's way of saying that the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    assert b"tokens/s" in seen
    assert b"\x1b[" in seen
    _, err = call(capsys, *command[3:], "--out", tmp_path / "b")
    assert "held-out" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("verb", ["info", "--help"])
def test_output_into_a_closed_pipe_is_quiet(verb: str) -> None:
    """The reader is gone before anything is written, so that no buffer of the pipe takes it."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mobilellm", verb]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1
