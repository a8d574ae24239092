"""llama.cpp behind the protocol of all runtimes, against our own network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.runtimes import llama_cpp
from mobilellm.runtimes.table import RUNTIMES, open_session, runtime_for, runtimes_of
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

IDS = [i * 37 % 300 for i in range(60)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("llama")
    source = checkpoint(folder / "m", network(), train_bpe([sample_text[:30_000]], 300))
    convert(source, folder / "m.gguf", "gguf")
    return folder / "m.gguf"


def test_a_prompt_its_parts_and_single_tokens_give_our_logits(gguf: Path) -> None:
    with torch.inference_mode():
        expected = load(gguf).network(torch.tensor([IDS]))[0, -1].numpy()
    with open_session(gguf, "llama.cpp", context=64, threads=1) as session:
        assert session.vocab_size == len(expected)
        assert session.context == 64
        for parts in ([IDS], [IDS[:20], IDS[20:]], [[i] for i in IDS]):
            session.reset()
            for part in parts:
                logits = session.feed(part)
            # keys, values and the attention between them are F16 there
            assert np.abs(logits - expected).max() < 1e-2 * expected.std()
        assert session.rewind(40) == 40
        assert np.abs(session.feed(IDS[40:]) - expected).max() < 1e-2 * expected.std()
        with pytest.raises(UserError, match="65 tokens exceed the file's context of 64"):
            session.feed(IDS[:5])


def test_what_the_file_says_is_what_the_session_says(gguf: Path) -> None:
    config = load(gguf).config
    with open_session(gguf, "llama.cpp") as session:
        assert session.context == config.max_position_embeddings
        assert session.end_tokens == tuple(config.eos_token_id)
    with pytest.raises(UserError, match="context 129: must be from 1 to the model's 128"):
        llama_cpp.LlamaSession(gguf, context=129)


def test_llama_cpp_comes_before_our_own_network(gguf: Path, tmp_path: Path) -> None:
    assert [runtime.name for runtime in runtimes_of(gguf)] == ["llama.cpp", "mobilellm"]
    with pytest.raises(UserError, match=r"llama\.cpp does not run such a file"):
        runtime_for(gguf.parent / "m", "llama.cpp")


def test_a_file_that_llama_cpp_refuses_is_one_line_with_its_words(
    gguf: Path, tmp_path: Path
) -> None:
    """The header is whole, the tensors are not those of its architecture."""
    (tmp_path / "wrong.gguf").write_bytes(
        gguf.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_gown.weight")
    )
    with pytest.raises(UserError, match=r"refused by llama\.cpp \(.*blk\.1\.ffn_down") as refused:
        llama_cpp.LlamaSession(tmp_path / "wrong.gguf")
    assert "\n" not in str(refused.value)
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:5000])
    with pytest.raises(UserError):
        llama_cpp.LlamaSession(tmp_path / "cut.gguf")


def test_a_missing_package_is_one_line_that_names_the_extra(
    gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match="not installed") as missing:
        llama_cpp.LlamaSession(gguf)
    assert missing.value.hint == "pip install 'mobilellm[llama]'"
    assert not RUNTIMES["llama.cpp"].installed
    assert runtime_for(gguf).name == "mobilellm"
    llama_cpp.library.cache_clear()


def test_a_library_without_the_api_is_one_line() -> None:
    import _ctypes

    with pytest.raises(UserError, match="does not export llama_log_set"):
        llama_cpp.Library(_ctypes.__file__)
