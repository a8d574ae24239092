"""`info --check` compares ids with the tool that a format is for."""

import contextlib
import json
from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network

from mobilellm.cli import main
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows import token_check
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    found = tmp_path_factory.mktemp("check") / "m"
    return checkpoint(found, network(), train_bpe([sample_text[:30_000]], 320))


def info(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["info", *arguments, "--check"])
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out + said.err


def test_a_folder_is_compared_with_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    status, said = info(capsys, str(folder), "--json")
    found = json.loads(said)["token_check"]
    assert (status, found["tool"], found["differences"]) == (0, "transformers", [])
    assert found["texts"] > 20


def test_a_gguf_is_compared_with_llama_cpp(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    convert(folder, tmp_path / "m.gguf", "gguf")
    status, said = info(capsys, str(tmp_path / "m.gguf"))
    assert status == 0
    assert "the same for" in said
    assert "llama.cpp's" in said


def test_a_tokenizer_model_is_compared_with_sentencepiece(
    tmp_path: Path, sentencepiece_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoint(tmp_path / "m", network(vocab_size=600))
    (found / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    status, said = info(capsys, str(found))
    assert status == 0
    assert "sentencepiece's" in said


def test_other_ids_are_shown_and_end_with_status_1(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("xllamacpp")
    convert(folder, tmp_path / "m.gguf", "gguf")
    own = Tokenizer.load(folder)

    @contextlib.contextmanager
    def other(_: Path):
        yield lambda text, parse_special: own.encode(text.lstrip(), parse_special=parse_special)

    monkeypatch.setattr(token_check, "llama_cpp_tokens", other)
    status, said = info(capsys, str(tmp_path / "m.gguf"))
    assert status == 1
    assert "other for" in said
    assert "' leading space'" in said


def test_without_a_tokenizer_it_is_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = info(capsys, str(checkpoint(tmp_path / "m", network())))
    assert status == 2
    assert "no tokenizer" in said
