"""Pairs of answers of every form become rows whose mask is the answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.command_line import call
from tests.rows import write_rows

from mobilellm.conversations.pairs import read_pair
from mobilellm.conversations.prepare_preferences import prepare_preferences
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.validate import validate
from mobilellm.errors import UserError
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import encode_conversation
from mobilellm.tokenizer.tokenizer import Tokenizer

ASKED = {"role": "user", "content": "what is a fox"}
GOOD = {"role": "assistant", "content": "an animal"}
BAD = {"role": "assistant", "content": "a hen"}
EARLIER = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]


@pytest.mark.parametrize(
    "row",
    [
        {
            "input": {"messages": [ASKED]},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        {"prompt": "what is a fox", "chosen": "an animal", "rejected": "a hen"},
        {"prompt": "what is a fox", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 9.0},
        {"instruction": "what is a fox", "output": "x", "chosen": "an animal", "rejected": "a hen"},
    ],
)
def test_every_form_is_recognised(row: dict[str, Any]) -> None:
    pair = read_pair(row, "x")
    assert (pair.asked, pair.chosen, pair.rejected) == ([ASKED], [GOOD], [BAD])


def test_turns_that_both_have_were_asked() -> None:
    row = {"chosen": [*EARLIER, ASKED, GOOD], "rejected": [*EARLIER, ASKED, BAD]}
    pair = read_pair(row, "x")
    assert pair.asked == [*EARLIER, ASKED]
    assert (pair.chosen, pair.rejected) == ([GOOD], [BAD])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "chosen": "y"}, "no pair of answers (found prompt, chosen)"),
        ([1], "list, not an object"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "both answers are the same"),
        ({"prompt": "x", "chosen": " ", "rejected": "y"}, "chosen: message 2: an empty turn"),
        ({"prompt": "x", "chosen": "y", "rejected": 3}, "rejected: must be text or a list"),
        ({"prompt": "x", "chosen": [ASKED], "rejected": "y"}, "here speaks user"),
        ({"prompt": "x", "chosen": [], "rejected": "y"}, "here speaks nothing"),
        ({"chosen": "y", "rejected": "z"}, "nothing says what was asked"),
        ({"chosen": [ASKED, GOOD], "rejected": [EARLIER[0], BAD]}, "begin with different messages"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "what was asked must be text"),
        ({"input": [], "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "an object"),
        ({"prompt": "x", "chosen": "fox " * 90, "rejected": "z"}, "tokens in both answers, a row"),
    ],
)
def test_a_bad_pair_is_one_line_with_its_place(
    row: Any, said: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    good = {"prompt": "what is a fox", "chosen": "an animal", "rejected": "a hen"}
    file = write_rows(tmp_path / "pairs.jsonl", [good, row, *[good] * 30])
    options: dict[str, Any] = {"tokenizer": tokenizer, "sequence_length": 100, "held_out": 0.3}
    with pytest.raises(UserError) as caught:
        prepare_preferences([file], tmp_path / "out", **options)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    manifest = prepare_preferences([file], tmp_path / "out", on_bad="skip", **options)
    assert (manifest["preferences"]["pairs"], manifest["preferences"]["left_out"]) == (31, 1)


def test_rows_hold_whole_pairs_and_their_mask_is_the_answers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [
        {"chosen": [*EARLIER, ASKED, GOOD], "rejected": [*EARLIER, ASKED, BAD]}
        if i % 3 == 0
        else {"prompt": f"what is {i} <|im_end|>", "chosen": "fox " * (i % 7 + 1), "rejected": "x"}
        for i in range(60)
    ]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    manifest = prepare_preferences(
        [file], tmp_path / "out", tokenizer=tokenizer, sequence_length=180, held_out=0.2
    )
    assert not validate(tmp_path / "out").faults_in_all
    data = TokenFolder.open(tmp_path / "out", verify=True)
    assert data.row == 181
    template = ChatTemplate.of(tokenizer)
    expected = []
    for row in rows:
        pair = read_pair(row, "x")
        for answer in (pair.chosen, pair.rejected):
            encoded = encode_conversation(tokenizer, template, [*pair.asked, *answer])
            alone = encode_conversation(tokenizer, template, pair.asked).ids
            own = [t and i >= len(alone) for i, t in enumerate(encoded.trained)]
            expected.append((encoded.ids, own))
    found, padding = [], 0
    for split in ("train", "held_out"):
        stream = data.tokens(split)
        assert stream.row == 181
        tokens, begin = stream.read(0, len(stream)).tolist(), 0
        bits, ends = stream.trained(0, len(stream)).tolist(), stream.ends().tolist()
        assert {181 * i for i in range(1, len(stream) // 181 + 1)} <= set(ends)
        for end in ends:
            last = max(i for i in range(begin, end) if bits[i]) + 2  # a line's end is not trained
            found.append((tokens[begin:last], bits[begin:last]))
            padding += end - last
            begin = end
    assert sorted(found) == sorted(expected)
    assert padding == sum(manifest["preferences"]["padding_tokens"].values())
    assert sum(len(ids) for ids, _ in expected) + padding == sum(
        split["tokens"] for split in manifest["splits"].values()
    )


def test_the_verb(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    good = {"prompt": "what is a fox", "chosen": "an animal", "rejected": "a hen"}
    file = write_rows(tmp_path / "pairs.jsonl", [good] * 20)
    given = ("prepare", "--preferences", file, "--out", tmp_path / "out")
    for more, message in (
        ([], "--preferences needs --tokenizer"),
        (["--chat"], "are two things"),
    ):
        assert message in call(capsys, *given, *more, status=2)[1]
    more = ["--held-out", "0.3", "--sequence-length", "128"]
    printed, _ = call(capsys, *given, *more, "--tokenizer", tmp_path / "tokenizer")
    assert "pairs of answers: 20, 0 left out" in printed
    assert "data.sequence_length = 128" in printed
