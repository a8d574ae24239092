"""What lies beside a tokenizer.model counts, as it does for transformers."""

import json
from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network
from tests.sentencepiece_files import sentencepiece_file

from mobilellm.errors import UserError
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.convert import convert

ADDED = {"<|im_start|>": 600, "<|im_end|>": 601}
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.fixture
def folder(tmp_path: Path, sample_text: str) -> Path:
    """A checkpoint of 602 rows with a SentencePiece model of 600 pieces."""
    found = checkpoint(tmp_path / "m", network(vocab_size=602))
    content = sentencepiece_file(sample_text[:200_000], character_coverage=1.0)
    (found / "tokenizer.model").write_bytes(content)
    return found


def name_tokens(folder: Path, special: bool = True, **settings) -> None:
    """Write the added tokens and the named ones beside the model."""
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    decoder = {str(i): {"content": token, "special": special} | FLAGS for token, i in ADDED.items()}
    values = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | NAMES | settings))


def test_added_tokens_and_the_named_end_are_kept(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    name_tokens(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert (ours.vocab_size, ours.eos_id) == (len(theirs), theirs.eos_token_id) == (602, 601)
    assert [ours.token(i) for i in (600, 601)] == list(ADDED)
    convert(folder, tmp_path / "out", "hf")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Hello there<|im_end|>"
    assert (len(again), again.eos_token_id) == (602, 601)
    bare = {"add_special_tokens": False}
    assert again(text, **bare)["input_ids"] == theirs(text, **bare)["input_ids"]


@pytest.mark.parametrize("flag", [True, False])
def test_add_bos_token_is_heeded(folder: Path, flag: bool) -> None:
    from transformers import AutoTokenizer

    name_tokens(folder, add_bos_token=flag)
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert ours.bos_id == theirs.bos_token_id == 1
    assert [1] * ours.add_bos + ours.encode("Hello") == theirs("Hello")["input_ids"]


def test_added_tokens_that_cannot_be_exact_are_refused(folder: Path) -> None:
    name_tokens(folder, special=False)
    with pytest.raises(UserError, match="is not special"):
        Tokenizer.load(folder)
    name_tokens(folder)
    (folder / "added_tokens.json").write_text(json.dumps(ADDED | {"<gap>": 700}))
    with pytest.raises(UserError, match="cannot have the id 700"):
        Tokenizer.load(folder)
