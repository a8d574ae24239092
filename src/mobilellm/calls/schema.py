"""Whether a value is what a schema of a function's arguments says, before anything is run.

    fault_of({"seats": "two"}, {"type": "object", "properties": {"seats": {"type": "integer"}}})
    # "value: seats: 'two' is not integer"

It knows the keys that `calls.functions` writes: type, properties, required, items, enum, anyOf
and additionalProperties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def fault_of(value: Any, schema: Mapping[str, Any], where: str = "value") -> str:
    """What is wrong with the value; empty where nothing is."""
    if "anyOf" in schema:
        faults = [fault_of(value, one, where) for one in schema["anyOf"]]
        return "" if "" in faults else faults[0]
    kinds = schema.get("type", list(KINDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(is_kind(value, kind) for kind in kinds):
        return f"{where}: {_short(value)} is not {' or '.join(kinds)}"
    choices = schema.get("enum", [value])
    if not any(type(one) is type(value) and one == value for one in choices):
        return f"{where}: {_short(value)} is none of {', '.join(map(_short, choices))}"
    if isinstance(value, list) and "items" in schema:
        for number, one in enumerate(value, 1):
            if fault := fault_of(one, schema["items"], f"{where}: item {number}"):
                return fault
    return _fault_of_object(value, schema, where) if isinstance(value, dict) else ""


def _fault_of_object(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str:
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where}: {name} is missing"
    properties, further = schema.get("properties"), schema.get("additionalProperties")
    for name, one in value.items():
        if properties is not None and name in properties:
            fault = fault_of(one, properties[name], f"{where}: {name}")
        elif isinstance(further, Mapping):
            fault = fault_of(one, further, f"{where}: {name}")
        else:
            fault = f"{where}: {name:.40} is unknown" if properties is not None else ""
        if fault:
            return fault
    return ""


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value is of one of JSON Schema's types."""
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS.get(kind, ()))


def _short(value: Any) -> str:
    return repr(value)[:60]
