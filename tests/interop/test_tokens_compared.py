"""`convert` compares tokens, too: a result with other tokens than its source does not appear."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.interop.networks import checkpoint, network
from tokenizers import AddedToken

from mobilellm.errors import UserError
from mobilellm.gguf import tokenizer_keys
from mobilellm.gguf.pre_tokenizers import PRE_TOKENIZERS
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows import verification
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000], "22 333 4444 " * 1000], 300)


@pytest.fixture(params=["llama.cpp", "our own reading"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What reads the ids back from GGUF."""
    if request.param == "llama.cpp":
        pytest.importorskip("xllamacpp")
    else:
        absent = SimpleNamespace(RUNTIME=SimpleNamespace(installed=False))
        monkeypatch.setattr(verification, "llama_cpp", absent)
    return str(request.param)


def test_gguf_with_another_way_to_cut_is_not_written(
    tmp_path: Path, tokenizer: Tokenizer, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "m", network(), tokenizer)
    parts_of = tokenizer_keys.byte_level_parts

    def of_another_name(tokenizer: Tokenizer) -> object:
        parts = parts_of(tokenizer)
        (smollm,) = [each for each in PRE_TOKENIZERS if each.names[0] == "smollm"]
        object.__setattr__(parts, "cut", smollm)  # digits one by one
        return parts

    monkeypatch.setattr(tokenizer_keys, "byte_level_parts", of_another_name)
    with pytest.raises(UserError, match=r"another one in \d+ of the probes .*333"):
        convert(folder, tmp_path / "m.gguf", "gguf")
    assert not list(tmp_path.glob("*.gguf"))
    convert(folder, tmp_path / "m.gguf", "gguf", verify=False)


def test_what_gguf_cannot_say_is_counted_by_both_readers(
    tmp_path: Path, tokenizer: Tokenizer, reader: str
) -> None:
    other = tokenizer.replaced()
    other.fast.add_tokens([AddedToken("<tag>", single_word=True, normalized=False)])
    other = tokenizer.replaced(other.fast)
    folder = checkpoint(tmp_path / "m", network(vocab_size=other.vocab_size), other)
    notes = convert(folder, tmp_path / "m.gguf", "gguf").notes
    assert "GGUF cannot say single_word, which <tag> of the tokenizer has" in notes
    # "a <tag>b<tag> c" has none of them as a word.
    assert any("other ids for 1 of" in note and "a <tag>b<tag> c" in note for note in notes)


@pytest.mark.parametrize("to", ["hf", "mobilellm"])
def test_a_folder_that_loses_a_token_is_not_written(
    tmp_path: Path, tokenizer: Tokenizer, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tokenizer.replaced()
    other.fast.add_special_tokens(["<|turn|>"])
    other = tokenizer.replaced(other.fast)
    folder = checkpoint(tmp_path / "m", network(vocab_size=other.vocab_size), other)
    save = Tokenizer.save
    monkeypatch.setattr(Tokenizer, "save", lambda self, folder: save(tokenizer, folder))
    with pytest.raises(UserError, match="vocab_size: 301 became 300"):
        convert(folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Tokenizer, "save", save)
    convert(folder, tmp_path / "out", to)
    read = load(tmp_path / "out").require_tokenizer()
    assert read.encode("<|turn|>", parse_special=True) == [300]
