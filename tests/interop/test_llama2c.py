"""llama2.c's files: random networks, and the real model of 260 thousand parameters."""

from pathlib import Path

import pytest
import torch
from tests.interop.llama2c_file import llama2c_bytes
from tests.interop.networks import logits, network

from mobilellm.errors import UserError
from mobilellm.interop.load import describe, load
from mobilellm.workflows.convert import convert


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_both_versions_are_read_to_the_bit(tmp_path: Path, version: int, tied: bool) -> None:
    model = network(tie_word_embeddings=tied)
    (tmp_path / "m.bin").write_bytes(llama2c_bytes(model, version))
    loaded = load(tmp_path / "m.bin")
    assert torch.equal(logits(loaded.network), logits(model))
    config, _, origin = describe(tmp_path / "m.bin")
    assert config == loaded.config
    assert origin == {"format": "llama2c", "file": "m.bin", "llama2c_version": version}


def test_it_is_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(llama2c_bytes(network()))
    with pytest.raises(
        UserError,
        match="unknown format 'llama2c'; known: executorch, gguf, hf, mobilellm, onnx, web",
    ):
        convert(tmp_path / "m.bin", tmp_path / "again.bin", "llama2c")
    convert(tmp_path / "m.bin", tmp_path / "hf", "hf")
    assert torch.equal(logits(load(tmp_path / "hf").network), logits(network()))


class TestStories:
    """The real llama2.c model of 260 thousand parameters."""

    STORY = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
        "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know"
    )

    @pytest.fixture
    def model(self, shared: Path) -> Path:
        return shared / "models/stories260K/stories260K.bin"

    def test_the_empty_prompt_gives_the_well_known_story(self, model: Path) -> None:
        text = load(model).generate("", max_new_tokens=150)
        assert text.startswith(self.STORY)

    def test_the_whole_file_is_read(self, model: Path) -> None:
        """Every number of the file is in the network: written again, the bytes are the same."""
        assert llama2c_bytes(load(model).network) == model.read_bytes()

    def test_the_tokenizer_beside_it_is_read(self, model: Path) -> None:
        tokenizer = load(model).tokenizer
        assert tokenizer.vocab_size == 512
        ids = tokenizer.encode("Once upon a time, \u2603")
        assert [tokenizer.token(i) for i in ids[-3:]] == ["<0xE2>", "<0x98>", "<0x83>"]
        assert tokenizer.decode(ids) == "Once upon a time, \u2603"

    def test_through_gguf_the_story_is_the_same(self, model: Path, tmp_path: Path) -> None:
        convert(model, tmp_path / "m.gguf", "gguf")
        assert load(tmp_path / "m.gguf").generate("", max_new_tokens=150).startswith(self.STORY)
