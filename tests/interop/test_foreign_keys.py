"""What other tools leave behind in a model's folder refuses no model, and is named."""

import json
from pathlib import Path

import pytest
import torch
from tests.command_line import status_of
from tests.interop.networks import checkpoint, logits, network
from tokenizers import AddedToken

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.interop.loaded import prompt_ids
from mobilellm.model.generation import Sampling, draw
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 320)


def with_keys(folder: Path, **keys: object) -> Path:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | keys))
    return folder


def test_keys_that_cannot_change_the_network_are_named(tmp_path: Path) -> None:
    model = network()
    folder = with_keys(
        checkpoint(tmp_path / "m", model),
        unsloth_fixed=True,
        max_sequence_length=2048,
        layer_types=["full_attention", "full_attention"],
        eos_token_id=[2, 320],
    )
    loaded = load(folder)
    torch.testing.assert_close(logits(loaded.network), logits(model))
    assert loaded.config.eos_token_id == 2  # the other one is outside the vocabulary
    (note,) = loaded.notes
    assert note.endswith("left out: layer_types, max_sequence_length, unsloth_fixed")
    assert note in convert(folder, tmp_path / "out", "hf").notes
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40)[None] * 37 % 300
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, logits(model), atol=1e-5, rtol=1e-5)


def test_a_key_that_could_is_refused_unless_the_user_says_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_keys(checkpoint(tmp_path / "m", network()), embedding_scale=1.0)
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--to", "hf"]
    assert status_of(*arguments) == 2
    assert "'embedding_scale'" in (said := capsys.readouterr().err)
    assert "--ignore-keys" in said
    assert status_of(*arguments, "--ignore-keys", "embedding_scale") == 0
    assert "left out: embedding_scale" in capsys.readouterr().out
    sliding = with_keys(folder, layer_types=["sliding_attention", "full_attention"])
    with pytest.raises(UserError, match="layer_types"):
        load(sliding, ignored=["embedding_scale"])


def test_a_pad_token_beyond_the_rows_is_allowed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = tokenizer.replaced()
    other.fast.add_special_tokens(["[PAD]"])
    other = tokenizer.replaced(other.fast)
    assert other.vocab_size == 321
    folder = checkpoint(tmp_path / "m", network(), other)
    loaded = load(folder)
    assert "[PAD] (320)" in loaded.notes[0]
    read = loaded.require_tokenizer()
    assert read.vocab_size == 320
    assert read.encode("Hi [PAD] there") == other.encode("Hi [PAD] there")
    assert max(read.encode("Hi [PAD] there", parse_special=True)) < 320
    notes = convert(folder, tmp_path / "m.gguf", "gguf").notes
    assert loaded.notes[0] in notes


def test_other_tokens_beyond_the_rows_are_another_models(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    ordinary = tokenizer.replaced()
    ordinary.fast.add_tokens([AddedToken("<tag>")])
    ends = tokenizer.replaced()
    ends.fast.add_special_tokens(["<|end|>"])
    for name, other in {
        "ordinary": tokenizer.replaced(ordinary.fast),
        "ends": Tokenizer(ends.fast, name="ends", bos_id=None, eos_id=320),
    }.items():
        with pytest.raises(UserError, match="321 tokens, the embedding 320 rows"):
            load(checkpoint(tmp_path / name, network(), other))


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompt_ids(tokenizer, "<|endoftext|>Hi") != [0, *tokenizer.encode("Hi")]
    assert prompt_ids(tokenizer, "<|endoftext|>Hi", special=True) == [0, *tokenizer.encode("Hi")]
    folder = checkpoint(tmp_path / "m", network(), tokenizer)
    counts = {}
    for flag in ([], ["--special"]):
        arguments = ["generate", str(folder), "--prompt", "<|endoftext|>", "--max-new-tokens", "1"]
        assert status_of(*arguments, "--json", *flag) == 0
        counts[bool(flag)] = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert counts[False] > counts[True] == 1


def test_bos_that_a_prompt_spells_out_is_not_put_there_twice(tokenizer: Tokenizer) -> None:
    from tokenizers import processors

    other = tokenizer.replaced()
    other.fast.post_processor = processors.TemplateProcessing(
        single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", 0)]
    )
    other = Tokenizer(other.fast, name="bos", bos_id=0, eos_id=0)
    ids = [0, *tokenizer.encode("Hi")]
    assert prompt_ids(other, "Hi") == prompt_ids(other, "Hi", special=True) == ids
    assert prompt_ids(other, "<|endoftext|>Hi", special=True) == ids


@pytest.mark.parametrize("temperature", [1e-38, 1e-46, 5e-324, 1e-20])
def test_the_coldest_temperatures_draw_the_likeliest(temperature: float) -> None:
    scores = torch.tensor([1.0, 30.0, -50.0, 29.9])
    sampling = Sampling(temperature=temperature, top_p=0.95)
    assert draw(scores, sampling, torch.Generator().manual_seed(0)) == 1
