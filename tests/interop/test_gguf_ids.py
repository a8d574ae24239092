"""Our reading of a tokenizer in a GGUF gives the ids that llama.cpp has for the same file."""

import json
import random
from pathlib import Path

import pytest
from tests.interop.gguf_tokenizer import tokenizer_file
from tests.interop.networks import checkpoint, network

from mobilellm.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from mobilellm.interop.gguf_reader import read_tokenizer
from mobilellm.runtimes.llama_cpp_tokens import llama_cpp_tokens
from mobilellm.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    SPACE,
    UNUSED,
    USER_DEFINED,
    read_model,
)
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.convert import convert
from mobilellm.workflows.token_probe import TEXTS

pytest.importorskip("xllamacpp")

LETTERS = (
    "aZé ß 1٣²½ \n\r\t\u00a0\u3000'sLL.,!$<=>+`^|_/中日ーㄅ한אع\u0301\u200b😀ǅʰªİ，。！“’—\u2028▁"
)
MARKUP = ["<|im_start|>", "<h1>", "\n\n", "  ", "   "]


def strange_texts(count: int = 400) -> list[str]:
    """Texts that no one writes, of letters from everywhere."""
    draw = random.Random(0)
    return [
        "".join(
            draw.choice(LETTERS)
            if draw.random() < 0.6
            else draw.choice(MARKUP)
            if draw.random() < 0.2
            else chr(
                draw.randint(32, 0x2FFF) if draw.random() < 0.5 else draw.randint(0xF000, 0x1FFFF)
            )
            for _ in range(draw.randint(1, 40))
        )
        for _ in range(count)
    ]


def equal_ids(path: Path, texts: list[str]) -> None:
    ours = read_tokenizer(path)
    assert ours is not None
    with llama_cpp_tokens(path) as theirs:
        for text in texts:
            assert ours.encode(text) == theirs(text), text
            assert ours.encode(text, parse_special=True) == theirs(text, parse_special=True), text


def trained(pre: PreTokenizer, text: str) -> tuple[list[str], list[str]]:
    """Pieces and merges of a byte-level BPE whose text is cut that way."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers, trainers

    content = json.loads(Fast(models.BPE()).to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre.stages()}
    fast = Fast.from_str(json.dumps(content))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator([text, *TEXTS * 20], trainer)
    model = json.loads(fast.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(m) for m in model["merges"]]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_a_pre_tokenizer_cuts_as_llama_cpp_does(
    tmp_path: Path, sample_text: str, pre: PreTokenizer
) -> None:
    pieces, merges = trained(pre, sample_text[:60_000])
    types = [CONTROL] + [NORMAL] * (len(pieces) - 1)
    for name in pre.names:
        if name == "gpt2":  # in files of others; llama.cpp does not open them
            continue
        path = tmp_path / f"{name}.gguf"
        tokenizer_file(path, pieces, types, model="gpt2", pre=name, merges=merges, eos_token_id=0)
        texts = [*TEXTS, "a<|endoftext|> b", *strange_texts(), *sample_text[:3000].split("\n\n")]
        equal_ids(path, texts)
    if pre.names == ("default",):
        path = tmp_path / "none.gguf"
        tokenizer_file(path, pieces, types, model="gpt2", merges=merges, eos_token_id=0)
        equal_ids(path, list(TEXTS))


@pytest.mark.parametrize("space_first", [True, False])
def test_a_sentencepiece_vocabulary_with_added_tokens_reads_as_in_llama_cpp(
    tmp_path: Path, sentencepiece_model: Path, space_first: bool
) -> None:
    """Gemma's kind puts no space first and has pieces of spaces and line ends that users define."""
    model = read_model(sentencepiece_model)
    pieces, types, scores = list(model.pieces), list(model.types), list(model.scores)
    for piece, kind in [
        *((piece, USER_DEFINED) for piece in MARKUP),
        ("<|im_end|>", CONTROL),
        (f"the{SPACE}th", UNUSED),
        ("[PAD0]", UNUSED),
    ]:
        pieces.append(piece)
        types.append(kind)
        scores.append(-1000.0 - len(pieces))
    path = tokenizer_file(
        tmp_path / "m.gguf",
        pieces,
        types,
        model="llama",
        pre="default",
        scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=space_first,
    )
    texts = [*TEXTS, "<|im_start|>user\nHi <|im_end|> there", "a <h1> b<h1>c", "the the", "   x"]
    equal_ids(path, [*texts, *strange_texts()])


def test_a_llama_vocabulary_with_a_token_that_is_not_special_goes_to_gguf(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    tokenizer = Tokenizer.load(sentencepiece_model)
    tokenizer.fast.add_tokens(["<|im_start|>"])
    tokenizer = Tokenizer(tokenizer.fast, name="m", bos_id=1, eos_id=2)
    folder = checkpoint(tmp_path / "m", network(vocab_size=601), tokenizer)
    notes = convert(folder, tmp_path / "m.gguf", "gguf").notes
    assert any("<|im_start|> is looked for in normalized text" in note for note in notes)
    equal_ids(tmp_path / "m.gguf", ["<|im_start|>user\nHi", "a <|im_start|> b", *TEXTS])


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "smollm"])
def test_byte_level_tokenizers_go_to_gguf_with_their_way_to_cut(
    tmp_path: Path, sample_text: str, name: str
) -> None:
    """From the tokenizer.json of the family, ids of which the tokenizers library gives."""
    from tokenizers import Tokenizer as Fast

    (pre,) = [each for each in PRE_TOKENIZERS if each.names[0] == name]
    pieces, merges = trained(pre, sample_text[:60_000])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    stages = pre.stages()
    if pre.spellings:  # as the family's own file says it
        stages[0]["pattern"]["Regex"] = pre.spellings[0][0]
    content = json.loads(Tokenizer.load(write_plain(tmp_path, vocabulary, merges)).fast.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    content["model"]["ignore_merges"] = pre.ignore_merges
    content["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    tokenizer = Tokenizer(Fast.from_str(json.dumps(content)), name=name, bos_id=None, eos_id=0)
    folder = checkpoint(tmp_path / "m", network(vocab_size=len(pieces)), tokenizer)
    notes = convert(folder, tmp_path / "m.gguf", "gguf").notes
    assert any("NFC" in note for note in notes) == (name == "qwen2")
    assert any("combining marks" in note for note in notes) == (name == "tekken")
    with llama_cpp_tokens(tmp_path / "m.gguf") as theirs:
        for text in [*TEXTS, sample_text[:2000]]:
            if "\u0301" not in text and "न" not in text:
                assert theirs(text) == tokenizer.encode(text), text


def write_plain(folder: Path, vocabulary: dict[str, int], merges: list[str]) -> Path:
    """A tokenizer.json of these pieces."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Fast

    pairs = [tuple(merge.split(" ")) for merge in merges]
    fast = Fast(models.BPE(vocab=vocabulary, merges=pairs))
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
