"""Dialogues with services, and the services' definitions, as Schema-Guided Dialogue writes them.

    services, talks = split_services([Path("sgd_schema.jsonl.gz"), Path("sgd_train.jsonl.gz")])
    conversation = services.conversation(row, "sgd_train.jsonl.gz:1")

A service's intents become tools, its slots their parameters; a turn's call becomes an assistant's
tool call, with the service's result as a tool's message and the turn's text as what is said to it.
An intent's name is the tool's; where two services of a dialogue share it, `Service.Intent` is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.readers.table import rows
from mobilellm.streams.places import Place

DEFINITION = ("service_name", "intents", "slots")
DIALOGUE = ("services", "turns")


def values(file: Place) -> Iterator[tuple[Any, str]]:
    """Each value of a file, and where it stands. `UserError` for one that cannot be read."""
    for row in rows(file):
        if row.fault is not None:
            raise row.fault
        yield row.value, row.where()


@dataclass
class Services:
    """Definitions of services by name."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    """Services that the training part has (`split` is train)."""

    def add(self, row: dict[str, Any], where: str) -> None:
        """Take a definition. `UserError` for one that is none."""
        name = row["service_name"]
        try:
            slots = {slot["name"]: slot for slot in row["slots"]}
            for intent in row["intents"]:
                for slot in [*intent["required_slots"], *intent["optional_slots"]]:
                    slots[slot]["description"]
                intent["name"], intent["description"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{where}: no definition of a service ({type(error).__name__}: {error})"
            ) from None
        self.rows.setdefault(name, row)
        if row.get("split") == "train":
            self.trained.add(name)

    def conversation(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """A dialogue as messages and tools. `UserError` for an unknown service."""
        names, turns = row["services"], row["turns"]
        if not isinstance(names, list) or not isinstance(turns, list):
            raise UserError(f"{where}: services and turns: must be lists")
        for name in names:
            if name not in self.rows:
                raise UserError(
                    f"{where}: service {str(name)!r:.60} is not defined",
                    hint="give its definitions first: sgd_schema.jsonl.gz",
                )
        own = self.names(names)
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns, 1):
            try:
                messages += _messages(turn, own)
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{where}: turn {number}: no turn ({type(error).__name__}: {error})"
                ) from None
        return {"messages": messages, "tools": self.tools(names)}

    def names(self, services: Sequence[str]) -> dict[tuple[str, str], str]:
        """(service, intent) -> the tool's name."""
        pairs = [(s, intent["name"]) for s in services for intent in self.rows[s]["intents"]]
        shared = Counter(intent for _, intent in pairs)
        return {(s, i): f"{s}.{i}" if shared[i] > 1 else i for s, i in pairs}

    def tools(self, services: Sequence[str]) -> list[dict[str, Any]]:
        """The tools of these services, in OpenAI's form."""
        own = self.names(services)
        return [
            {
                "type": "function",
                "function": {
                    "name": own[service, intent["name"]],
                    "description": intent["description"],
                    "parameters": self._parameters(service, intent),
                },
            }
            for service in services
            for intent in self.rows[service]["intents"]
        ]

    def _parameters(self, service: str, intent: dict[str, Any]) -> dict[str, Any]:
        slots = {slot["name"]: slot for slot in self.rows[service]["slots"]}
        properties = {}
        for name in [*intent["required_slots"], *intent["optional_slots"]]:
            slot = slots[name]
            properties[name] = {"type": "string", "description": slot["description"]}
            if slot.get("is_categorical") and slot.get("possible_values"):
                properties[name]["enum"] = slot["possible_values"]
        return {
            "type": "object",
            "properties": properties,
            "required": list(intent["required_slots"]),
        }


def _messages(turn: dict[str, Any], own: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """The messages of a turn: an assistant's call comes before its text, with the result between.
    An assistant's turn without either is none."""
    if turn["role"] != "assistant":
        return [{"role": turn["role"], "content": turn["text"]}]
    found: list[dict[str, Any]] = []
    if call := turn.get("call"):
        name = own[call["service"], call["method"]]
        function = {"name": name, "arguments": call["parameters"]}
        made = {"type": "function", "function": function}
        found.append({"role": "assistant", "content": "", "tool_calls": [made]})
        result = {"found": turn.get("results", 0), "first": turn.get("result")}
        told = orjson.dumps(result).decode()
        found.append({"role": "tool", "name": name, "content": told})
    if turn["text"].strip():
        found.append({"role": "assistant", "content": turn["text"]})
    return found


def split_services(files: Iterable[Place]) -> tuple[Services, list[Place]]:
    """The services that some of the files define, and the other files."""
    services, rest = Services(), []
    for file in files:
        first = next(iter(rows(file)), None)
        if first is None or not _is_definition(first.value):
            rest.append(file)
            continue
        for row, where in values(file):
            if not _is_definition(row):
                raise UserError(f"{where}: no definition of a service")
            services.add(row, where)
    return services, rest


def _is_definition(row: Any) -> bool:
    return isinstance(row, dict) and set(DEFINITION) <= set(row)
