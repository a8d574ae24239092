"""Whether calls are the right ones: by the rules of the Berkeley Function Calling Leaderboard.

    wrong_calls([Call("add", {"a": 1})], functions, [{"add": {"a": [1], "b": ["", 2]}}])
    # "" for right ones, else what is wrong

A call is right when its name is, every required argument is there and none is unknown, each has the
type of its parameter (an integer does for a float, a list for a tuple), and its value is one of
those that are accepted: texts without spaces and `,./-_*^`, in lower case; lists and objects value
by value; an accepted "" means that the argument may be left out. Several calls may come in any
order, and each answers one. Written after the description of the rules; BFCL v4, Apache-2.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mobilellm.calls.parse import Call
from mobilellm.calls.schema import KINDS, is_kind

Function = Mapping[str, Any]
Answer = Mapping[str, Mapping[str, Sequence[Any]]]
SKIPPED = re.compile(r"[ ,./\-_*^]")
# BFCL names types as Python does, or as JSON Schema does.
JSON_NAMES = {"dict": "object", "float": "number", "tuple": "array"}


def wrong_calls(
    calls: Sequence[Call], functions: Sequence[Function], answers: Sequence[Answer]
) -> str:
    """What is wrong with the calls, given what is accepted; empty where nothing is."""
    if len(calls) != len(answers):
        return f"{len(calls)} calls, {len(answers)} are right"
    by_name = {function["name"]: function for function in functions}
    left = list(answers)
    for call in calls:
        faults = []
        for number, answer in enumerate(left):
            fault = wrong_call(call, by_name, answer)
            if not fault:
                del left[number]
                break
            faults.append(fault)
        else:
            return faults[0]
    return ""


def wrong_call(call: Call, functions: Mapping[str, Function], answer: Answer) -> str:
    """What is wrong with one call."""
    ((name, accepted),) = answer.items()
    if call.name != name:
        return f"calls {call.name:.40}, not {name}"
    parameters = functions[name].get("parameters") or {}
    properties = parameters.get("properties") or {}
    for wanted in parameters.get("required") or ():
        if wanted not in call.arguments:
            return f"{name}: {wanted} is missing"
    for key, value in call.arguments.items():
        if key not in properties or key not in accepted:
            return f"{name}: {key:.40} is unknown"
        if fault := _wrong_value(value, properties[key], accepted[key]):
            return f"{name}: {key}: {fault}"
    for key, values in accepted.items():
        if key not in call.arguments and not any(_blank(one) for one in values):
            return f"{name}: {key} is missing"
    return ""


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value


def _wrong_value(value: Any, schema: Mapping[str, Any], accepted: Sequence[Any]) -> str:
    kind = schema.get("type")
    if any(type(one) is type(value) and one == value for one in accepted if not _blank(one)):
        return ""  # also one of another type: null, or the name of a variable
    if not _has_type(value, kind):
        return f"{value!r:.60} is not {kind}"
    inner = schema.get("items") or {}
    item = inner.get("type") if isinstance(inner, Mapping) else None
    if isinstance(value, list):
        for one in value:
            if not _has_type(one, item):
                return f"{one!r:.60} in it is not {item}"
    if any(_same(value, one) for one in accepted if not _blank(one)):
        return ""
    if isinstance(value, str) and _plain(value) == "" and any(_blank(one) for one in accepted):
        return ""
    return f"{value!r:.60} is not accepted"


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; of one that is no type of JSON, such as `any`, every one is."""
    name = JSON_NAMES.get(kind, kind)
    return name not in KINDS or is_kind(value, name)


def _same(value: Any, accepted: Any) -> bool:
    """Whether a value is the accepted one. Within an object each key has a list of them."""
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, str) and isinstance(accepted, str):
        return _plain(value) == _plain(accepted)
    if isinstance(value, list) and isinstance(accepted, (list, tuple)):
        return len(value) == len(accepted) and all(map(_same, value, accepted))
    if isinstance(value, dict) and isinstance(accepted, Mapping):
        return _same_object(value, accepted)
    return type(value) in (int, float, type(None)) and value == accepted


def _same_object(value: dict[str, Any], accepted: Mapping[str, Any]) -> bool:
    for key, one in value.items():
        choices = accepted.get(key)
        if not isinstance(choices, (list, tuple)):
            if key not in accepted or not _same(one, choices):
                return False
        elif not any(_same(one, choice) for choice in choices):
            return False
    for key, choices in accepted.items():
        optional = isinstance(choices, (list, tuple)) and any(_blank(one) for one in choices)
        if key not in value and not optional:
            return False
    return True


def _plain(text: str) -> str:
    return SKIPPED.sub("", text).lower().replace("'", '"')


def as_json_schema(schema: Any) -> Any:
    """A schema with Python's names of types in JSON Schema's."""
    if isinstance(schema, Mapping):
        found = {key: as_json_schema(one) for key, one in schema.items()}
        kind = schema.get("type")
        if isinstance(kind, str):
            found["type"] = JSON_NAMES.get(kind, kind)
            if kind == "any":
                del found["type"]
        return found
    return [as_json_schema(one) for one in schema] if isinstance(schema, list) else schema
