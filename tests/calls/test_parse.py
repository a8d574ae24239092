"""Calls in a text: every form that is read, and what is none."""

from __future__ import annotations

from typing import Any

import pytest

from mobilellm.calls.parse import Call, parse_calls

NOW: tuple[str, dict[str, Any]] = ("now", {})
ADD: tuple[str, dict[str, Any]] = ("add", {"a": 1, "b": 2})
TAGGED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (TAGGED, [ADD]),
        (f"{TAGGED}\n{TAGGED}", [ADD, ADD]),
        (TAGGED.replace("\n", ""), [ADD]),
        (TAGGED.removesuffix("\n</tool_call>"), [ADD]),  # cut off where the token ended it
        ('{"name": "add", "arguments": {"a": 1, "b": 2}}', [ADD]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', [ADD]),
        ('[{"name": "now"}, {"name": "add", "arguments": {"a": 1, "b": 2}}]', [NOW, ADD]),
        ('{"type": "function", "name": "now", "arguments": {}}', [NOW]),
        ('```json\n{"name": "now", "arguments": {}}\n```', [NOW]),
        ("now()", [NOW]),
        ("[add(a=1, b=2), now()]", [ADD, NOW]),
        ("```python\nadd(a=1, b=2)\n```", [ADD]),
        ("math.add(a=-1, b=[1.5, (2, 3)])", [("math.add", {"a": -1, "b": [1.5, [2, 3]]})]),
        ("f(a={'x': None}, b=true, c=False)", [("f", {"a": {"x": None}, "b": True, "c": False})]),
    ],
)
def test_calls(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    found = parse_calls(text)
    assert [(call.name, call.arguments) for call in found.calls] == calls
    assert found.fault == ""
    assert found.text == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is a fox?",
        "It is f(x) = 2, as you know.",
        "[1, 2, 3]",
        '{"answer": 3}',
        "[]",
        "(a fox)",
        "f" * 70_000 + "()",
        "print is a function",
    ],
)
def test_text_without_calls(text: str) -> None:
    found = parse_calls(text)
    assert (found.calls, found.fault, found.text) == ([], "", text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<tool_call>\n{broken\n</tool_call>", "no JSON"),
        ("<tool_call>\n3\n</tool_call>", "int, not an object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "a call without a name"),
        ('<tool_call>{"name": 3}</tool_call>', "a call without a name"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments of f: no object"),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "arguments of f: no JSON"),
        ('{"name": "f", "arguments": {', "no JSON"),
        ("f(1)", "f: an argument without a name"),
        ("f(**x)", "f: an argument without a name"),
        ("f(a=g())", "g() is no constant"),
        ("f(a=b)", "b is no constant"),
        ("f(a={1: 2})", "a key that is no text"),
        ("[f(a=1", "no Python call"),
        ("f()()", "f() is no name"),
        ("f(a=" + "(" * 5000 + ")" * 5000 + ")", "no Python call"),
        ("f(a=" + "-" * 3000 + "1)", ""),
    ],
)
def test_what_is_meant_as_a_call_and_is_none(text: str, fault: str) -> None:
    found = parse_calls(text)
    assert found.calls == []
    assert found.fault
    assert fault in found.fault
    assert len(found.fault.splitlines()) == 1


def test_a_good_call_beside_a_bad_one_and_text_around_them() -> None:
    found = parse_calls(f"Let me see.\n{TAGGED}\n<tool_call>{{</tool_call>")
    assert [call.name for call in found.calls] == ["add"]
    assert found.text == "Let me see."
    assert "no JSON" in found.fault


def test_a_call_as_it_is_shown_and_as_a_message_has_it() -> None:
    call = Call("f", {"a": "x\n", "b": [1]})
    assert str(call) == "f(a='x\\n', b=[1])"
    assert call.as_openai() == {
        "type": "function",
        "function": {"name": "f", "arguments": {"a": "x\n", "b": [1]}},
    }
