"""The forms in which conversations are written down, read as OpenAI's.

    read_conversation({"instruction": "Add", "input": "1 1", "output": "2"}, "data.jsonl:1")
    # [{"role": "user", "content": "Add\\n\\n1 1"}, {"role": "assistant", "content": "2"}]

`messages` with `tools`, `tool_calls` and results of tools is OpenAI's; prompt and completion,
instruction, input and output, and ShareGPT's `conversations` are told apart by their keys.
Dialogues with `services`, as Schema-Guided Dialogue has them, need the services' definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from mobilellm.conversations.services import DIALOGUE, Services
from mobilellm.errors import UserError
from mobilellm.tokenizer.chat_template import with_call_ids

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """What was said, in OpenAI's form; calls and their results have ids."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_conversation(row: Any, where: str, services: Services | None = None) -> Conversation:
    """The conversation of a line. `UserError` that names `where` for everything that is none.

    `services` are the definitions for a dialogue with services.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}, not an object")
    if set(DIALOGUE) <= set(row):
        row = (services or Services()).conversation(row, where)
    for keys, read in FORMS.items():
        if set(keys) <= set(row):
            messages = read(row, where)
            break
    else:
        found = ", ".join(list(row)[:10])
        known = "; ".join(" and ".join(keys) for keys in FORMS)
        raise UserError(f"{where}: no conversation (found {found})", hint=f"known: {known}")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, f"{where}: tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise UserError(f"{where}: tools: must be a list of objects")
    checked = [
        _message(message, f"{where}: message {number}")
        for number, message in enumerate(messages, start=1)
    ]
    _check_order(checked, where)
    return Conversation(with_call_ids(checked), tools or None)


def _check_order(messages: list[dict[str, Any]], where: str) -> None:
    """Whether somebody asks before somebody answers."""
    roles = [message["role"] for message in messages]
    spoken = [role for role in roles if role not in ("system", "developer")]
    if "assistant" not in spoken:
        raise UserError(f"{where}: the assistant says nothing, so that nothing can be learnt")
    if spoken[0] != "user":
        raise UserError(
            f"{where}: the first turn is the {spoken[0]}'s", hint="begin with the user's"
        )


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with a known role, text or calls in it, and calls' arguments as an object."""
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: {type(message).__name__}, not an object")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r:.40}", hint=f"known: {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{where}: a part of its content is no text")
        content = "".join(map(str, parts))
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where}: content is {type(content).__name__}, not text")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or (calls and role != "assistant"):
        raise UserError(f"{where}: tool_calls: must be a list, in a message of the assistant")
    if not calls and not (content or "").strip():
        raise UserError(f"{where}: an empty turn of the {role}")
    made = {**message, "content": content or ""}
    made.pop("tool_calls", None)
    if calls:
        made["tool_calls"] = [_call(call, f"{where}: call {n}") for n, call in enumerate(calls, 1)]
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise UserError(f"{where}: has no function")
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: has no name")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: arguments of {name:.40}")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: arguments of {name:.40}: must be a JSON object")
    return {**call, "type": "function", "function": {"name": name, "arguments": arguments}}


def _json(text: str, where: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON ({error})") from None


def _list(row: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(row[key], list):
        raise UserError(f"{where}: {key}: must be a list")
    return list(row[key])


def _messages(row: dict[str, Any], where: str) -> list[Any]:
    return _list(row, "messages", where)


def _sharegpt(row: dict[str, Any], where: str) -> list[Any]:
    found = []
    for turn in _list(row, "conversations", where):
        if not isinstance(turn, dict):
            raise UserError(f"{where}: a turn is {type(turn).__name__}, not an object")
        said = turn.get("from")
        role = SHAREGPT.get(said, said) if isinstance(said, str) else said
        found.append({"role": role, "content": turn.get("value")})
    return found


def _turns(row: dict[str, Any], where: str) -> list[Any]:
    turns = _list(row, "turns", where)
    return [
        {"role": turn.get("role"), "content": turn.get("text", turn.get("content"))}
        if isinstance(turn, dict)
        else turn
        for turn in turns
    ]


def _completion(row: dict[str, Any], where: str) -> list[Any]:
    asked, said = row["prompt"], row["completion"]
    return [
        *(asked if isinstance(asked, list) else [{"role": "user", "content": asked}]),
        *(said if isinstance(said, list) else [{"role": "assistant", "content": said}]),
    ]


def instruction_of(row: dict[str, Any], where: str) -> str:
    """What Alpaca's rows ask: the instruction and, below it, the input where there is one."""
    asked, given = row["instruction"], row.get("input") or ""
    if not isinstance(asked, str) or not isinstance(given, str):
        raise UserError(f"{where}: instruction and input must be text")
    return f"{asked}\n\n{given}" if given else asked


def _instruction(row: dict[str, Any], where: str) -> list[Any]:
    return [
        {"role": "user", "content": instruction_of(row, where)},
        {"role": "assistant", "content": row["output"]},
    ]


FORMS: dict[tuple[str, ...], Callable[[dict[str, Any], str], list[Any]]] = {
    ("messages",): _messages,
    ("conversations",): _sharegpt,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
    ("turns",): _turns,
}
