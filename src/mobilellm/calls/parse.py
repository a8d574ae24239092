"""Calls of functions in what a model wrote.

    found = parse_calls('<tool_call>\\n{"name": "now", "arguments": {}}\\n</tool_call>')
    found.calls        # [Call(name="now", arguments={})]
    found.fault        # what of it was meant as a call and is none

Three forms are read: JSON in the tags `<tool_call>`, which ChatML's templates have; a text that is
JSON as a whole, an object with name and arguments (or parameters) or a list of such; and a text
that is Python calls as a whole, `[f(a=1), g()]`, as the paper's and BFCL's prompts have them.
Nothing of it is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
FENCE = re.compile(r"\A```(?:json|python|tool_code)?\s*\n(.*?)\n?\s*```\Z", re.DOTALL)
PYTHON = re.compile(r"\A\[?\s*[A-Za-z_][\w.]*\s*\(")
MAX_TEXT = 1 << 16  # characters; a longer text holds no call
NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Call:
    """A function's name and the arguments to call it with."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    def as_openai(self) -> dict[str, Any]:
        """As an assistant's message has it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Parsed:
    """What a text says and calls."""

    text: str
    """Without the calls."""
    calls: list[Call] = field(default_factory=list)
    fault: str = ""
    """What was meant as a call and is none, and why; empty where everything parses."""


class CallError(ValueError):
    """Something that is no call."""


def parse_calls(text: str) -> Parsed:
    """The calls of a text. A fault in one leaves out that one."""
    if len(text) > MAX_TEXT:
        return Parsed(text)
    if "<tool_call>" in text:
        return _tagged(text)
    whole = text.strip()
    if found := FENCE.match(whole):
        whole = found[1].strip()
    if whole[:1] in ("{", "["):
        try:
            value = orjson.loads(whole)
        except orjson.JSONDecodeError as error:
            if whole.startswith("{") and '"name"' in whole:
                return Parsed(text, fault=f"no JSON ({error})")
        else:
            rows = value if isinstance(value, list) else [value]
            if rows and all(isinstance(row, dict) and "name" in row for row in rows):
                return _calls("", rows)
            return Parsed(text)
    return _python(text, whole) if PYTHON.match(whole) else Parsed(text)


def _tagged(text: str) -> Parsed:
    rows: list[Any] = []
    faults = []
    for inside in TAGGED.findall(text):
        try:
            value = orjson.loads(inside)
        except orjson.JSONDecodeError as error:
            faults.append(f"no JSON ({error})")
            continue
        rows += value if isinstance(value, list) else [value]
    found = _calls(TAGGED.sub("", text).strip(), rows)
    faults += [found.fault] if found.fault else []
    return Parsed(found.text, found.calls, "; ".join(faults))


def _calls(text: str, rows: list[Any]) -> Parsed:
    calls, faults = [], []
    for row in rows:
        try:
            calls.append(_call(row))
        except CallError as error:
            faults.append(str(error))
    return Parsed(text, calls, "; ".join(faults))


def _call(row: Any) -> Call:
    """A call of JSON."""
    if not isinstance(row, Mapping):
        raise CallError(f"{type(row).__name__}, not an object")
    row = row["function"] if isinstance(row.get("function"), Mapping) else row
    name = row.get("name")
    arguments = row.get("arguments", row.get("parameters", {}))
    if not isinstance(name, str) or not name.strip():
        raise CallError("a call without a name")
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            raise CallError(f"arguments of {name:.40}: no JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise CallError(f"arguments of {name:.40}: no object")
    return Call(name, arguments)


def _python(text: str, whole: str) -> Parsed:
    """Calls as Python writes them; text where the whole is none."""
    try:
        tree = ast.parse(whole, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        first = str(error).splitlines()[:1] or [type(error).__name__]
        looks = whole.startswith("[") or whole.endswith(")")
        return Parsed(text, fault=f"no Python call ({first[0]:.80})" if looks else "")
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
        return Parsed(text)
    calls, faults = [], []
    for node in nodes:
        assert isinstance(node, ast.Call)
        try:
            calls.append(_python_call(node))
        except (CallError, RecursionError) as error:
            faults.append(str(error) or "nested too deeply")
    return Parsed("", calls, "; ".join(faults))


def _python_call(node: ast.Call) -> Call:
    name = ast.unparse(node.func)
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise CallError(f"{name:.40} is no name")
    if node.args:
        raise CallError(f"{name:.40}: an argument without a name")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise CallError(f"{name:.40}: an argument without a name")
        arguments[keyword.arg] = _value(keyword.value)
    return Call(name, arguments)


def _value(node: ast.expr) -> Any:
    """A constant, or lists and dicts of such; a tuple is a list."""
    if isinstance(node, ast.Constant) and not isinstance(node.value, (bytes, complex)):
        return None if node.value is ... else node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise CallError("a key that is no text")
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _value(node.operand)
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    raise CallError(f"{ast.unparse(node):.40} is no constant")
