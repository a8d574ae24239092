"""`mobilellm profile` as a user meets it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests import command_line
from tests.interop.networks import checkpoint, network
from tests.profiling.test_profile import BANDWIDTH, FIGURES
from tests.report.pages import check

from mobilellm.profiling import profile as profiles


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", network())


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The answers of child processes by file name; others are good."""
    found: dict[str, Any] = {}

    def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
        answer = found.get(Path(request.get("file", "")).name, {"figures": FIGURES | BANDWIDTH})
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(profiles, "ask", ask)
    return found


def call(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> tuple[str, str]:
    return command_line.call(capsys, "profile", *arguments, status=status)


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    answers: dict[str, Any],
    width: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out, _ = call(capsys, model, "--repeats", 2)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert ("decode  spread" in out) == (width == 120)
    assert "50.0" in out  # tokens a second
    assert "5.0 GB/s" in out
    assert "joules" not in out
    assert "energy" not in out  # this machine does not tell


def test_energy_is_shown_where_the_machine_tells(
    capsys: pytest.CaptureFixture[str], model: Path, answers: dict[str, Any]
) -> None:
    answers["model"] = {"figures": FIGURES | {"joules_per_token": 0.25}}
    assert "0.250 J" in call(capsys, model)[0]


def test_out_has_a_profile_and_a_page(
    capsys: pytest.CaptureFixture[str], model: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    out, _ = call(capsys, model, "--repeats", 1, "--out", tmp_path / "o", "--json")
    assert json.loads(out) == json.loads((tmp_path / "o/profile.json").read_text())
    page = check(tmp_path / "o/profile.html")
    assert "Tokens written a second" in page.text
    assert "50.0" in page.text


def test_a_file_that_fails_is_said_and_changes_the_status(
    capsys: pytest.CaptureFixture[str], model: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    bad = checkpoint(tmp_path / "bad", network())
    answers["bad"] = {"error": "its process was killed by SIGSEGV", "user": False}
    out, err = call(capsys, model, bad, "--out", tmp_path / "o", status=1)
    assert "bad in mobilellm: failed: its process was killed by SIGSEGV" in out
    assert "bad in mobilellm: failed" in err
    assert "50.0" in out
    assert "SIGSEGV" in check(tmp_path / "o/profile.html").text
    out, _ = call(capsys, model, bad, "--json", status=1)
    assert [row["error"] is None for row in json.loads(out)["rows"]] == [True, False]


def test_after_ctrl_c_what_was_finished_is_printed(
    capsys: pytest.CaptureFixture[str], model: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    slow = checkpoint(tmp_path / "slow", network())
    answers["slow"] = KeyboardInterrupt()
    out, err = call(capsys, model, slow, "--out", tmp_path / "o", status=130)
    assert "50.0" in out
    assert "interrupted" in err
    assert json.loads((tmp_path / "o/profile.json").read_text())["interrupted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no file given"),
        (["absent.gguf"], "absent.gguf: no such file or folder"),
        (["MODEL", "--prompt", "0"], "prompt 0: must be 1 or more"),
        (["MODEL", "--repeats", "0"], "repeats 0: must be 1 or more"),
        (["MODEL", "--threads", "-1"], "threads -1: must be 1 or more"),
        (["MODEL", "--runtime", "lama.cpp"], "unknown runtime 'lama.cpp'; did you mean"),
        (["MODEL", "MODEL"], "the same file is given twice"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    answers: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    given = [str(model) if a == "MODEL" else a for a in arguments]
    out, err = call(capsys, *given, status=2)
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_context_that_is_too_short_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    from mobilellm.profiling import child as profile_child

    monkeypatch.setattr(
        profiles, "ask", lambda request, threads: profile_child.answer(request | {"threads": 1})
        if request["kind"] != "bandwidth" else {"figures": BANDWIDTH},
    )  # fmt: skip
    _, err = call(capsys, model, status=2)
    assert "context 640: must be from 1 to the model's 128 positions" in err
    assert len([line for line in err.splitlines() if line.startswith("mobilellm:")]) == 1


def test_a_place_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], model: Path, answers: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    _, err = call(capsys, model, "--out", tmp_path / "file", status=2)
    assert len(err.splitlines()) == 1
