"""Pairs of answers to one conversation, the better one first, in the forms that they come in.

    pair = read_pair({"prompt": "hi", "chosen": "hello", "rejected": "go"}, "pairs.jsonl:1")
    pair.asked, pair.chosen, pair.rejected

OpenAI's form has `input`, `preferred_output` and `non_preferred_output`. UltraFeedback's and TRL's
have `chosen` and `rejected`, each the text of the answer, its messages, or the whole conversation,
beside a `prompt`, an `instruction`, or nothing where both begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mobilellm.conversations.forms import instruction_of, read_conversation
from mobilellm.errors import UserError

OPENAI = ("input", "preferred_output", "non_preferred_output")
CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class Pair:
    """Two answers to one conversation, in OpenAI's form of messages."""

    asked: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_pair(row: Any, where: str) -> Pair:
    """The pair of a line. `UserError` that names `where` for everything that is none."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}, not an object")
    if set(OPENAI) <= set(row):
        given, chosen, rejected = (row[key] for key in OPENAI)
        if not isinstance(given, Mapping):
            raise UserError(f"{where}: input: must be an object with messages")
        asked, tools = given.get("messages"), given.get("tools")
    elif {CHOSEN, REJECTED} <= set(row):
        chosen, rejected, tools = row[CHOSEN], row[REJECTED], row.get("tools")
        asked = _asked(row, where)
    else:
        found = ", ".join(list(row)[:10])
        known = f"{' and '.join(OPENAI)}; prompt, chosen and rejected"
        raise UserError(f"{where}: no pair of answers (found {found})", hint=f"known: {known}")
    if asked is None or (_is_whole(chosen) and _is_whole(rejected)):
        asked, chosen, rejected = _common(chosen, rejected, where)
    if not isinstance(asked, list) or not asked:
        raise UserError(f"{where}: what was asked must be text or a list of messages")
    answers = [
        _answer(value, f"{where}: {name}")
        for name, value in ((CHOSEN, chosen), (REJECTED, rejected))
    ]
    talks = []
    for name, answer in zip((CHOSEN, REJECTED), answers, strict=True):
        talk = read_conversation(
            {"messages": [*asked, *answer], "tools": tools}, f"{where}: {name}"
        )
        talks.append(talk)
    size = len(asked)
    before, tools = talks[0].messages[:size], talks[0].tools
    pair = Pair(before, talks[0].messages[size:], talks[1].messages[size:], tools)
    if pair.chosen == pair.rejected:
        raise UserError(f"{where}: both answers are the same, so that nothing can be preferred")
    return pair


def _asked(row: dict[str, Any], where: str) -> Any:
    """What was asked, as messages; None where only the answers say it."""
    if "prompt" in row:
        given = row["prompt"]
    elif "instruction" in row:
        given = instruction_of(row, where)
    else:
        return None
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _common(chosen: Any, rejected: Any, where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages with which two whole conversations begin alike, and what follows in each."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UserError(f"{where}: nothing says what was asked", hint="give it as prompt")
    size = 0
    for mine, other in zip(chosen, rejected, strict=False):
        role = mine.get("role") if isinstance(mine, Mapping) else None
        if mine != other or (role == "assistant" and size + 1 in (len(chosen), len(rejected))):
            break
        size += 1
    if not size:
        raise UserError(f"{where}: {CHOSEN} and {REJECTED} begin with different messages")
    return chosen[:size], chosen[size:], rejected[size:]


def _is_whole(value: Any) -> bool:
    """Whether it is a conversation from its beginning, and not an answer alone."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("role") != "assistant"


def _answer(value: Any, where: str) -> list[Any]:
    """An answer as messages, all of them the assistant's."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: must be text or a list of messages")
    roles = {turn.get("role") if isinstance(turn, Mapping) else None for turn in value}
    if roles != {"assistant"}:
        said = ", ".join(sorted(f"{role!s:.40}" for role in roles)) or "nothing"
        raise UserError(
            f"{where}: an answer is the assistant's alone, here speaks {said}",
            hint="put what came before into prompt",
        )
    return value
