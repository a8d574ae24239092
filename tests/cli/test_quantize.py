"""`mobilellm quantize` as a user meets it."""

import json
from pathlib import Path

import pytest
from tests.command_line import call
from tests.interop.networks import checkpoint, network

from mobilellm.tokenizer.tokenizer import train_bpe


@pytest.fixture
def model(tmp_path: Path, sample_text: str) -> Path:
    (tmp_path / "text.txt").write_text(sample_text[:3_000])
    return checkpoint(tmp_path / "model", network(), train_bpe([sample_text[:30_000]], 320))


def test_a_model_is_quantized_and_info_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    shown, _ = call(
        capsys, "quantize", model, out, "--scheme", "w8a8", "--method", "gptq", "--text", text
    )
    assert "w8a8 by gptq, embedding int8" in shown
    assert "calibrated on" in shown
    assert "perplexity" in shown
    assert "quantization     w8a8 by gptq, embedding int8" in call(capsys, "info", out)[0]
    said = json.loads(call(capsys, "info", out, "--json")[0])
    assert said["quantization"]["facts"]["calibration"]["text"] == "text.txt"
    result = json.loads(call(capsys, "quantize", model, tmp_path / "two", "--json")[0])
    assert (result["scheme"], result["method"]) == ("int4", "search")
    assert result["bytes_after"] < result["bytes_before"] / 4
    # Evaluated with its activations rounded.
    score = json.loads(call(capsys, "eval", out, "--text", text, "--json")[0])
    plain = json.loads(call(capsys, "eval", model, "--text", text, "--json")[0])
    assert score["loss"] != plain["loss"]
    assert call(capsys, "generate", out, "--prompt", "the", "--max-new-tokens", 3)[0]


def test_the_table_is_printed_line_by_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    given = ["quantize", "--table", model, "--text", tmp_path / "text.txt", "--scheme", "int4"]
    shown, _ = call(capsys, *given, "--max-tokens", 100)
    lines = shown.splitlines()
    assert len(lines) == 1 + 2 + 3 * 2
    assert lines[0].split() == ["scheme", "method", "embedding", "MB", "perplexity", "over", "fp32"]
    assert max(map(len, lines)) <= 80
    found = json.loads(call(capsys, *given, "--method", "round", "--json")[0])
    assert [row["scheme"] for row in found["rows"]] == ["fp32", "bf16", "int4", "int4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no folder to write to"),
        (["--table"], "--table measures on a text"),
        (["out", "--table"], "--table writes no model"),
        (["out", "--tasks", "piqa"], "--tasks are scored in the table alone"),
        (["out", "--max-tokens", "1"], "must be 2 or more"),
        (["out", "--method", "gptq"], "method gptq is calibrated on a text"),
    ],
)
def test_what_does_not_go_together_is_a_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: Path,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, err = call(capsys, "quantize", model, *arguments, status=2)
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("out").exists()
