"""Scores of API calling: the paper's columns on Schema-Guided Dialogue, and BFCL's single turns.

    items = api_items(folder, limit=200)
    api_scores(ask, items)["seen"]["EM_intent"]      # {"percent": ..., "low": ..., "high": ...}
    bfcl_scores(ask, folder)

Every turn of the assistant in a test dialogue is asked for by itself, after what was really said
before it, the earlier calls and their results too. A turn with a call is an item of EM_intent (one
call, of the right function) and EM_structure (all its arguments, too); what is said to a result, or
without a call, is an item of Rouge. Arguments are compared as text in lower case without blanks
around them. The paper's own protocol and data were not released, so its rows are of other data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.calls.answers import figure, rows_of
from mobilellm.calls.matching import as_json_schema, wrong_calls
from mobilellm.calls.parse import Call, Parsed, parse_calls
from mobilellm.calls.rouge import rouge_1, rouge_l
from mobilellm.conversations.forms import read_conversation
from mobilellm.conversations.services import Services
from mobilellm.errors import UserError

Ask = Callable[[Sequence[Mapping[str, Any]], Any], str | None]
Progress = Callable[[float, float], None]
COLUMNS = ("EM_intent", "EM_structure", "Rouge-1", "Rouge-L")
PARTS = ("all", "seen", "unseen")
# arXiv 2402.14905, table 6.
PUBLISHED = {
    "MobileLLM-350M": (65.3, 48.8, 46.8, 44.6),
    "LLaMA-2-7B": (62.8, 50.9, 56.5, 54.3),
}
BFCL = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "irrelevance",
    "live_irrelevance",
    "live_relevance",
)


@dataclass(frozen=True)
class Item:
    """A turn of the assistant."""

    dialogue: str
    seen: bool
    """Whether the services that it is about are in the training part."""
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    call: Call | None
    """The right call; None for a turn of text."""
    reply: str


def api_items(folder: Path | None, limit: int | None = None) -> list[Item]:
    """Items of sgd_test by sgd_schema in `folder`: of all dialogues, in an order that mixes
    services, the first `limit` turns."""
    services = Services()
    for row, where in rows_of(folder, "sgd_schema"):
        services.add(row, where)
    talks = list(rows_of(folder, "sgd_test"))
    items: list[Item] = []
    for number in np.random.default_rng(0).permutation(len(talks)):
        row, where = talks[number]
        items += _items(row, where, services)
        if limit is not None and len(items) >= limit:
            return items[:limit]
    return items


def _items(row: Any, where: str, services: Services) -> list[Item]:
    talk = read_conversation(row, where, services)
    service_of = {tool: service for (service, _), tool in services.names(row["services"]).items()}
    all_seen = set(row["services"]) <= services.trained
    found = []
    for i, message in enumerate(talk.messages):
        if message["role"] != "assistant":
            continue
        call, seen = None, all_seen
        if made := message.get("tool_calls"):
            function = made[0]["function"]
            call = Call(function["name"], function["arguments"])
            seen = service_of[call.name] in services.trained
        found.append(
            Item(str(row.get("id", where)), seen, talk.messages[:i], talk.tools or [], call,
                 message["content"])
        )  # fmt: skip
    return found


def scores_of(item: Item, text: str | None) -> dict[str, float]:
    """An answer's scores, each from 0 to 1; None is an answer that had no room."""
    found = parse_calls(text) if text is not None else Parsed("")
    if item.call is None:
        said = "" if found.calls else found.text
        return {
            "Rouge-1": rouge_1(said, item.reply),
            "Rouge-L": rouge_l(said, item.reply),
            "called": float(bool(found.calls)),
        }
    one = found.calls[0] if len(found.calls) == 1 and not found.fault else None
    intent = one is not None and one.name == item.call.name
    whole = one is not None and intent and _same(one.arguments, item.call.arguments)
    return {"EM_intent": float(intent), "EM_structure": float(whole)}


def _same(arguments: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return {k: _plain(v) for k, v in arguments.items()} == {k: _plain(v) for k, v in right.items()}


def _plain(value: Any) -> str:
    return " ".join(str(value).split()).lower()


def api_scores(ask: Ask, items: Sequence[Item], progress: Progress | None = None) -> dict[str, Any]:
    """Scores by part ("all", "seen", "unseen") and column, with intervals over dialogues."""
    answers: list[str | None] = []
    for number, item in enumerate(items, 1):
        answers.append(ask(item.messages, item.tools))
        if progress:
            progress(number, len(items))
    rows = [scores_of(item, text) for item, text in zip(items, answers, strict=True)]
    found: dict[str, Any] = {}
    for part in PARTS:
        chosen = [
            i for i, item in enumerate(items) if part == "all" or item.seen == (part == "seen")
        ]
        found[part] = {}
        for column in (*COLUMNS, "called"):
            own = [i for i in chosen if column in rows[i]]
            values = [rows[i][column] for i in own]
            found[part][column] = figure(values, [items[i].dialogue for i in own])
    found["no_room"] = sum(text is None for text in answers)
    found["published"] = {
        name: dict(zip(COLUMNS, row, strict=True)) | {"note": "other data"}
        for name, row in PUBLISHED.items()
    }
    return found


def bfcl_scores(
    ask: Ask, folder: Path | None, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Percent of right items by set. `limit` is of each set; sets that are not in the folder are
    left out, but one must be."""
    sets: dict[str, list[Any]] = {}
    for name in BFCL:
        try:
            sets[name] = [row for row, _ in rows_of(folder, f"bfcl_v4_{name}")][:limit]
        except UserError:
            if folder is None:
                raise
    if not sets:
        raise UserError(f"{folder}: has no bfcl_v4_*.jsonl or .jsonl.gz")
    total, done = sum(map(len, sets.values())), 0
    found: dict[str, Any] = {}
    for name, rows in sets.items():
        right = []
        for row in rows:
            tools = [
                {"type": "function", "function": as_json_schema(one)} for one in row["function"]
            ]
            text = ask(row["question"][0], tools)
            right.append(float(not bfcl_fault(name, row, text)))
            done += 1
            if progress:
                progress(done, total)
        found[name] = figure(right, range(len(right)))
    return found


def bfcl_fault(name: str, row: Mapping[str, Any], text: str | None) -> str:
    """What is wrong with the answer to an item of a set; empty where it is right."""
    if text is None:
        return "no room for an answer"
    found = parse_calls(text)
    if name.endswith("irrelevance"):
        return "a call, where no function serves" if found.calls else ""
    if name.endswith("relevance"):
        return "" if found.calls else "no call"
    return found.fault or wrong_calls(found.calls, row["function"], row["ground_truth"])
