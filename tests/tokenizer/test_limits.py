"""Tokenizers that were made to cost: each ends in a line that names it, in bounded time."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Fast

from mobilellm.errors import UserError
from mobilellm.patterns import limits
from mobilellm.tokenizer.encoder import Encoder
from mobilellm.tokenizer.sentencepiece import BYTE, NORMAL, SentencePieceModel, to_fast_tokenizer
from mobilellm.tokenizer.tokenizer import Tokenizer

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+|[^\r\n\p{L}\p{N}]?((?=[\p{L}])"
    r"([^a-z]))+((?=[\p{L}])([^A-Z]))*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_level(pattern: str | None = None) -> Fast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    cut = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*cut, last])
    return fast


def saved(fast: Fast, folder: Path) -> Path:
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("pattern", "risky"),
    [
        (r"(a+)+$", True),
        (r"(?:\s*x*)*", True),
        (r"((a|b)+c?){2,}", True),
        (r"(\w+\s?)*$", True),
        (r"(a+)+?", True),
        (r"(a+)++", False),
        (r"(a{2,3})+", False),
        (r"\(a+\)+", False),
        (r"[(a+)]+", False),
        (GPT_2, False),
        (LLAMA_3, False),
        (TEKKEN, False),
    ],
)
def test_patterns_that_repeat_a_repetition_are_told_apart(pattern: str, risky: bool) -> None:
    content = json.loads(byte_level(pattern).to_str())
    assert limits.is_risky(content) == risky


@pytest.mark.parametrize("letters", [22, 3000])
def test_a_pattern_that_doubles_its_time_is_given_up(
    tmp_path: Path, letters: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Twenty-two letters and another take a hundredth of a second each time; three thousand make
    the library panic."""
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    tokenizer = Tokenizer.load(saved(byte_level(r"(a+)+$"), tmp_path))
    start = time.process_time()
    with pytest.raises(UserError, match="tokenizer ") as caught:
        tokenizer.encode(("a" * letters + "b") * 1000)
    assert time.process_time() - start < 5
    assert tmp_path.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("a b") == [tokenizer.fast.token_to_id(c) for c in ("a", "\u0120", "b")]


def test_spaces_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve million under Llama 3's pattern make the library panic."""
    tokenizer = Tokenizer.load(saved(byte_level(LLAMA_3), tmp_path))
    with pytest.raises(UserError, match="more than 4,194,304 spaces in a row"):
        tokenizer.encode("x" + " " * 5_000_000)
    with pytest.raises(UserError, match="without a place to cut"):
        list(Encoder(tokenizer, "tokenizers").long([" " * 9_000_000]))


def test_a_piece_of_millions_of_characters_is_refused_at_once() -> None:
    pieces = ["<unk>", "\u2581", *(f"<0x{i:02X}>" for i in range(256)), "ab" * 1_500_000]
    for added_first in (False, True):
        model = SentencePieceModel(
            pieces=pieces,
            scores=[-float(i) for i in range(len(pieces))],
            types=[2, NORMAL, *[BYTE] * 256, NORMAL],
            model_type=2,
            byte_fallback=True,
            remove_extra_whitespaces=False,
            added_first=added_first,
        )
        with pytest.raises(UserError, match="a piece of 3,000,000 characters, the limit is 512"):
            to_fast_tokenizer(model)
