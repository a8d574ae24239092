"""A GGUF gives llama.cpp the ids that the source gives transformers, or is refused."""

import json
from pathlib import Path

import pytest
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

TEXTS = [
    "Hello there",
    "the king",
    "123",
    "two  spaces   and three",
    "naïve ☃ 😀",
    "\ttab\n\nlines",
    "don't I'll we've",
    "日本語",
    "a\u00a0b",
    "</s> <s>",
    "trailing ",
]


def saved_by_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer as transformers' own Llama class writes it."""
    from transformers import AutoTokenizer

    source = folder.with_name("source")
    source.mkdir()
    tokenizer.fast.save(str(source / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


@pytest.mark.parametrize("saved_by", ["us", "transformers"])
def test_a_llama_tokenizer_puts_its_space_before_a_text(
    tmp_path: Path, sentencepiece_model: Path, saved_by: str
) -> None:
    """transformers 5 writes Metaspace where a normalizer did the same before."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(sentencepiece_model)
    folder = checkpoint(tmp_path / "m", network(vocab_size=600), tokenizer)
    if saved_by == "transformers":
        saved_by_transformers(folder, tokenizer)
        content = json.loads((folder / "tokenizer.json").read_text())
        assert content["pre_tokenizer"]["type"] == "Metaspace"
    theirs = AutoTokenizer.from_pretrained(folder)
    result = convert(folder, tmp_path / "m.gguf", "gguf")
    begins = "llama.cpp puts a space before a text that begins with one, too"
    assert (begins in result.notes) == (saved_by == "transformers")
    server, again = LlamaCpp(tmp_path / "m.gguf"), load(tmp_path / "m.gguf").tokenizer
    for text in TEXTS:
        ids = load(folder).tokenizer.encode(text)
        if "<s>" not in text:  # transformers takes it for the token
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert server.tokenize(text) == ids, text
        assert again.encode(text) == ids, text


def changed(tokenizer: Tokenizer, **parts) -> Tokenizer:
    """A tokenizer with parts of its tokenizer.json replaced."""
    from tokenizers import Tokenizer as Fast

    content = json.loads(tokenizer.fast.to_str())
    model = parts.pop("model", {})
    content |= parts
    content["model"] |= model
    return Tokenizer(
        Fast.from_str(json.dumps(content)),
        name="changed",
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer has a stage NFKC"),
        ({"normalizer": {"type": "Prepend", "prepend": "x"}}, "normalizer has a stage Prepend"),
        ({"normalizer": None, "pre_tokenizer": None}, "does not write spaces as"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer has a stage Whitespace"),
        ({"model": {"ignore_merges": True}}, "ignore_merges = True"),
    ],
)
def test_what_sentencepiece_does_not_do_is_refused(
    tmp_path: Path, sentencepiece_model: Path, parts: dict, words: str
) -> None:
    tokenizer = changed(Tokenizer.load(sentencepiece_model), **parts)
    folder = checkpoint(tmp_path / "m", network(vocab_size=600), tokenizer)
    with pytest.raises(UserError, match=words) as caught:
        convert(folder, tmp_path / "m.gguf", "gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


def test_what_a_byte_level_tokenizer_cannot_say_is_refused_or_noted(
    tmp_path: Path, sample_text: str
) -> None:
    plain = train_bpe([sample_text[:30_000]], 300)
    content = json.loads(plain.fast.to_str())["model"]
    whole = changed(plain, model={"ignore_merges": True, "merges": content["merges"][:-1]})
    folder = checkpoint(tmp_path / "whole", network(), whole)
    with pytest.raises(UserError, match="ignore_merges"):
        convert(folder, tmp_path / "m.gguf", "gguf")
    # Where every piece is what its merges lead to, the setting changes nothing.
    same = checkpoint(tmp_path / "same", network(), changed(plain, model={"ignore_merges": True}))
    assert convert(same, tmp_path / "same.gguf", "gguf").notes == []
    token = json.loads(plain.fast.to_str())["added_tokens"][0] | {"rstrip": True}
    folder = checkpoint(tmp_path / "strip", network(), changed(plain, added_tokens=[token]))
    notes = convert(folder, tmp_path / "m.gguf", "gguf").notes
    assert notes[0] == "GGUF cannot say rstrip, which <|endoftext|> of the tokenizer has"
    assert "other ids for 2 of" in notes[1]  # the same texts by llama.cpp and by our own reading


def test_weights_open_without_their_tokenizer(tmp_path: Path, sentencepiece_model: Path) -> None:
    """One that cannot be read is a fault when it is needed; another one can take its place."""
    folder = checkpoint(tmp_path / "m", network(vocab_size=600))
    (folder / "tokenizer.model").write_bytes(b"damaged")
    loaded = load(folder)
    assert loaded.tokenizer is None
    for use in (loaded.require_tokenizer, lambda: loaded.generate("a")):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            use()
    with pytest.raises(UserError, match="not a SentencePiece model"):
        convert(folder, tmp_path / "hf", "hf")
    convert(folder, tmp_path / "hf", "hf", tokenizer=sentencepiece_model)
    expected = Tokenizer.load(sentencepiece_model).encode("the king")
    assert load(tmp_path / "hf").tokenizer.encode("the king") == expected


def test_chat_templates_go_through_every_format(tmp_path: Path, sample_text: str) -> None:
    """The tokenizer's own, and those that have names."""
    templates = {"default": "{{ 'Größe' }}\n", "tool_use": "{{ tools }}"}
    tokenizer = train_bpe([sample_text[:20_000]], 300).replaced(chat_template=templates["default"])
    tokenizer.named_templates["tool_use"] = templates["tool_use"]
    at = checkpoint(tmp_path / "start", network(vocab_size=300), tokenizer)
    for to in ("hf", "gguf", "mobilellm", "gguf", "hf"):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.{to}"
        convert(at, out, to)
        found = load(out).tokenizer
        assert found is not None
        assert found.chat_template == templates["default"]
        assert found.named_templates == {"tool_use": templates["tool_use"]}
        at = out
