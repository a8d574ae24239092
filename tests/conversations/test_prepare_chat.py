"""Conversations of every form become documents whose mask is what the assistant says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.command_line import call, refused
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows

from mobilellm.conversations.forms import read_conversation
from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.validate import validate
from mobilellm.errors import UserError
from mobilellm.tokenizer.chat_template import CHATML, ChatTemplate
from mobilellm.tokenizer.conversation import encode_conversation
from mobilellm.tokenizer.tokenizer import Tokenizer

ASKED = {"role": "user", "content": "what is a fox"}
SAID = {"role": "assistant", "content": "an animal"}
CALL = {"function": {"name": "look", "arguments": '{"for": "hen"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"messages": [{**ASKED, "content": [{"type": "text", "text": "what is a fox"}]}, SAID]},
        {"prompt": "what is a fox", "completion": "an animal"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"instruction": "what is a fox", "input": "", "output": "an animal"},
        {"conversations": [
            {"from": "human", "value": "what is a fox"}, {"from": "gpt", "value": "an animal"},
        ]},
        {"turns": [
            {"role": "user", "text": "what is a fox"}, {"role": "assistant", "text": "an animal"},
        ]},
    ],
)  # fmt: skip
def test_every_form_is_recognised(row: dict[str, Any]) -> None:
    assert read_conversation(row, "x").messages == [ASKED, SAID]


def test_the_tokenizer_can_be_that_of_a_run(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recipes' first lines say: `--tokenizer runs/base`."""
    rows = [{"messages": [{**ASKED, "content": f"what is {i}"}, SAID]} for i in range(9)]
    write_rows(tmp_path / "talks.jsonl", rows)
    tokenizer.save(tmp_path / "own")
    newest = tmp_path / "run/checkpoints/step-00000002"
    newest.parent.mkdir(parents=True)
    checkpoint(newest, network(vocab_size=tokenizer.vocab_size), tokenizer)
    for name, held in (("of-a-run", "run"), ("of-a-folder", "own")):
        given = ("prepare", "--chat", tmp_path / "talks.jsonl", "--held-out", 0.3)
        call(capsys, *given, "--tokenizer", tmp_path / held, "--out", tmp_path / name)
    one, two = (TokenFolder.open(tmp_path / name) for name in ("of-a-run", "of-a-folder"))
    assert one.tokenizer().sha256 == two.tokenizer().sha256
    assert one.tokens("train").read(0, 50).tolist() == two.tokens("train").read(0, 50).tolist()
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    given = ("prepare", "--chat", tmp_path / "talks.jsonl", "--out", tmp_path / "none")
    said = refused(capsys, *given, "--tokenizer", tmp_path / "empty")
    assert "no model here" in said


def test_an_input_follows_its_instruction() -> None:
    row = {"instruction": "Add", "input": "1 1", "output": "2"}
    assert read_conversation(row, "x").messages[0]["content"] == "Add\n\n1 1"


def test_calls_have_their_arguments_as_objects() -> None:
    row = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    message = read_conversation(row | {"tools": [TOOL]}, "x").messages[1]
    function = {"name": "look", "arguments": {"for": "hen"}}
    called = {"type": "function", "function": function, "id": "call00000"}
    assert message["tool_calls"] == [called]


def calling(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}, SAID]}, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": " "}, SAID]}, "message 1: an empty turn"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, "message 2: an empty turn"),
        ({"messages": [SAID, ASKED]}, "the first turn is the assistant's"),
        ({"messages": [ASKED]}, "the assistant says nothing"),
        ({"messages": []}, "the assistant says nothing"),
        ({"messages": "x"}, "messages: must be a list"),
        ({"messages": [ASKED, calling(arguments="{}")]}, "call 1: has no name"),
        ({"messages": [ASKED, calling(name="look", arguments="{")]}, "no JSON"),
        ({"messages": [ASKED, calling(name="look", arguments="[1]")]}, "must be a JSON object"),
        ({"messages": [ASKED, SAID], "tools": "{"}, "tools: no JSON"),
        ({"text": "x"}, "no conversation (found text)"),
        ([1], "list, not an object"),
    ],
)
def test_a_bad_conversation_is_one_line_with_its_place(
    row: Any, said: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": [ASKED, SAID]}, row])
    with pytest.raises(UserError) as caught:
        prepare_chat([file], tmp_path / "out", tokenizer=tokenizer)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talks.jsonl"]


def test_documents_and_mask_are_the_conversations(tokenizer: Tokenizer, tmp_path: Path) -> None:
    marked = {"role": "user", "content": "a <|im_end|> of text"}
    rows = [{"messages": [marked, {**SAID, "content": f"answer {i}"}]} for i in range(40)]
    file = write_rows(tmp_path / "talks.jsonl", rows)
    manifest = prepare_chat([file], tmp_path / "out", tokenizer=tokenizer, held_out=0.2)
    assert not validate(tmp_path / "out").faults_in_all
    data = TokenFolder.open(tmp_path / "out", verify=True)
    assert data.masked
    template = ChatTemplate.of(tokenizer)
    expected = [encode_conversation(tokenizer, template, row["messages"]) for row in rows]
    found = []
    for split in ("train", "held_out"):
        stream = data.tokens(split)
        tokens, begin = stream.read(0, len(stream)).tolist(), 0
        bits = stream.trained(0, len(stream)).tolist()
        for end in stream.ends().tolist():
            found.append((tokens[begin:end], bits[begin:end]))
            begin = end
    assert sorted(found) == sorted((one.ids, one.trained) for one in expected)
    assert manifest["conversations"]["trained_tokens"] == sum(sum(e.trained) for e in expected)
    assert Tokenizer.load(tmp_path / "out/tokenizer").chat_template == CHATML


def test_long_conversations_lose_whole_turns_and_are_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    template = ChatTemplate.of(tokenizer)
    talk = [ASKED, SAID, ASKED, SAID]
    context = len(encode_conversation(tokenizer, template, talk).ids) - 1
    long = {"messages": [{**ASKED, "content": "fox " * 200}, SAID]}
    rows: list[Any] = [{"messages": talk}, *[{"messages": [ASKED, SAID]}] * 30, long]
    file = write_rows(tmp_path / "talks.jsonl", rows)
    options: dict[str, Any] = {"tokenizer": tokenizer, "context": context, "held_out": 0.3}
    with pytest.raises(UserError, match=r"talks.jsonl:32: .* tokens up to the first answer"):
        prepare_chat([file], tmp_path / "out", **options)
    manifest = prepare_chat([file], tmp_path / "out", on_bad="skip", **options)
    counts = manifest["conversations"]
    kinds = ("whole", "shortened", "messages_left_out", "left_out")
    assert [counts[kind] for kind in kinds] == [30, 1, 2, 1]
    short = len(encode_conversation(tokenizer, template, [ASKED, SAID]).ids)
    assert sum(split["tokens"] for split in manifest["splits"].values()) == 31 * short


def test_the_verb(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": [ASKED, SAID]}] * 20)
    given = ["prepare", "--chat", file, "--out", tmp_path / "out", "--held-out", "0.3"]
    _, err = call(capsys, *given, status=2)
    assert err.startswith("mobilellm: --chat needs --tokenizer")
    out, _ = call(capsys, *given, "--tokenizer", tmp_path / "tokenizer")
    assert "20 whole, 0 without" in out


TALK_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_CALL = {
    "messages": [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "look", "content": "no hen"},
        SAID,
    ],
    "tools": [TOOL],
}


@pytest.mark.parametrize("drop", ["tools", "calls of functions"])
def test_a_template_that_passes_over_calls_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], drop: str
) -> None:
    """SmolLM2's own template is one: a model would learn to say nothing where it should call."""
    talking = tokenizer.replaced(chat_template=TALK_ALONE)
    talking.save(tmp_path / "tokenizer")
    row = dict(WITH_CALL)
    if drop != "tools":
        del row["tools"]
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": [ASKED, SAID]}, *[row] * 20])
    given = ["prepare", "--chat", file, "--out", tmp_path / "out", "--held-out", "0.3"]
    given += ["--tokenizer", tmp_path / "tokenizer"]
    _, err = call(capsys, *given, status=2)
    assert f"{file}:2: " in err
    assert f"chat template: does not write {drop}, so that a model would not see them" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    call(capsys, *given, "--template", "chatml")
    made = Tokenizer.load(tmp_path / "out/tokenizer")
    assert made.chat_template == CHATML
    stream = TokenFolder.open(tmp_path / "out").tokens("train")
    begin = [0, *stream.ends().tolist()][-2]
    ids, bits = stream.read(begin, len(stream)), stream.trained(begin, len(stream))
    said = made.decode([i for i, bit in zip(ids.tolist(), bits.tolist(), strict=True) if bit])
    assert '<tool_call>\n{"name": "look", "arguments": {"for": "hen"}}\n</tool_call>' in said


def test_a_template_may_write_no_results_of_no_calls(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What a conversation does not have, no template has to write."""
    talking = tokenizer.replaced(chat_template=TALK_ALONE)
    file = write_rows(tmp_path / "talks.jsonl", [{"messages": [ASKED, SAID]}] * 20)
    prepare_chat([file], tmp_path / "out", tokenizer=talking, held_out=0.3)
