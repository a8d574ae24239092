"""A tokenizer's rules may lengthen a text, but not without bound."""

import json
from typing import Any

import pytest

from mobilellm.errors import UserError
from mobilellm.tokenizer.growth import MAX_GROWTH, check_growth
from mobilellm.tokenizer.tokenizer import train_bpe


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLE = replace({"String": "a"}, "aa")


@pytest.mark.parametrize(
    "part",
    [
        None,
        {"type": "NFC"},
        replace({"String": " "}, "▁"),
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, DOUBLE]},
        replace({"Regex": r"\s+"}, " "),
        replace({"Regex": r" {2,}"}, "▁"),
        replace({"Regex": r"\p{L}+"}, "x"),
        replace({"Regex": r"(?<=\d)x"}, ""),
        {"type": "Sequence", "normalizers": [DOUBLE] * 6},
    ],
)
def test_rules_in_use_are_let_through(part: Any) -> None:
    check_growth({"normalizer": part, "decoder": None}, "t.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 7}}, "128 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}}, "its decoder could make"),
        ({"normalizer": replace({"Regex": "."}, "x" * 5000)}, "5e[+]03 times as long"),
        ({"normalizer": replace({"Regex": ""}, "x")}, "matches nothing"),
        ({"normalizer": replace({"Regex": "a*"}, "x")}, "matches nothing"),
        ({"normalizer": replace({"Regex": "(?=a)"}, "x")}, "matches nothing"),
        ({"normalizer": replace({"Regex": "^"}, "x")}, "matches nothing"),
        ({"normalizer": replace({"String": ""}, "x")}, "matches nothing"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "puts 5000 characters"),
        ({"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 2000}}, "2000 rules"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 4}] * 4,
                }
            },
            "times as long",
        ),
    ],
)
def test_rules_that_grow_without_bound_are_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_growth(content, "t.json")
    assert "\n" not in str(caught.value)
    assert MAX_GROWTH == 64


def test_a_file_is_refused_before_it_meets_a_text() -> None:
    from tokenizers import Tokenizer as Fast

    tokenizer = train_bpe(["a few words " * 9], 300)
    content = json.loads(tokenizer.fast.to_str())
    content["normalizer"] = {"type": "Sequence", "normalizers": [DOUBLE] * 60}
    with pytest.raises(UserError, match="times as long"):
        tokenizer.replaced(Fast.from_str(json.dumps(content)))
