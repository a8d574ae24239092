"""Functions that a model may call: their schemas from signature and docstring, and running them.

    tools = read_tools(["weather.py:forecast,now"])
    tools["forecast"].as_openai()          # what the chat template writes
    tools["forecast"].run({"city": "Oslo"})

A parameter's type becomes JSON Schema: str, int, float, bool, None, list[...], dict[str, ...],
Literal[...] and unions of these; one with a default can be left out. The docstring's text before
"Args:" is the description, and a line "name: what it is" below it describes a parameter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from mobilellm.calls.schema import fault_of
from mobilellm.errors import UserError, first_line, unknown_name
from mobilellm.printable import printable

MAX_RESULT = 20_000  # characters of a result that go back to the model
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?):\s*$")
DESCRIBED = re.compile(r"^\s+\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True)
class Tool:
    """A function of the user's."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of its arguments."""
    function: Callable[..., Any]

    def as_openai(self) -> dict[str, Any]:
        """As chat templates are given it."""
        described = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": described}

    def run(self, arguments: Mapping[str, Any]) -> str:
        """Call it; its result as text, JSON unless it is text. Its error is a result, too.

        What it prints goes to standard error.
        """
        fault = fault_of(arguments, self.parameters, "arguments")
        if fault:
            return f"error: {fault}"
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                found = self.function(**arguments)
            text = found if isinstance(found, str) else json.dumps(found, default=str)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it does, the talk goes on: SystemExit, too
            text = f"error: {type(error).__name__}: {first_line(error)}"
        if said := printed.getvalue():
            sys.stderr.write(printable(said))
        if len(text) > MAX_RESULT:
            text = f"{text[:MAX_RESULT]} (cut off: {len(text):,} characters)"
        return text


def read_tools(given: Sequence[str]) -> dict[str, Tool]:
    """Tools by name, of texts FILE.py:function,...; the files are imported, which runs them.

    `UserError` for a file that cannot be imported, a function that is not there, or one with a
    parameter that has no type that JSON knows.
    """
    tools: dict[str, Tool] = {}
    for text in given:
        file, colon, names = text.rpartition(":")
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        if not colon or not wanted or not file:
            raise UserError(f"--tools {text}: names no function", hint="give FILE.py:function,...")
        module = _imported(Path(file))
        for name in wanted:
            function = getattr(module, name, None)
            if not inspect.isfunction(function):
                found = [n for n, f in vars(module).items() if inspect.isfunction(f)]
                raise unknown_name("function", name, found, file)
            if name in tools:
                raise UserError(f"--tools {text}: {name} is given twice")
            tools[name] = tool_of(function, f"{file}: {name}")
    return tools


def _imported(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise UserError(f"{path}: no such file", hint="give FILE.py:function,...")
    spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: no Python file", hint="give FILE.py:function,...")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from None
    return module


def tool_of(function: Callable[..., Any], where: str = "") -> Tool:
    """The tool of a function. `UserError` for what has no schema."""
    where = where or function.__name__
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # evaluating annotations is running the user's code
        raise UserError(f"{where}: its types cannot be read ({first_line(error)})") from None
    description, described = _docstring(function)
    properties: dict[str, Any] = {}
    required = []
    for name, parameter in inspect.signature(function).parameters.items():
        place = f"{where}: parameter {name}"
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise UserError(f"{place}: cannot be given by name", hint="make it an ordinary one")
        if parameter.kind == parameter.VAR_KEYWORD:
            raise UserError(f"{place}: takes any name", hint="name its parameters one by one")
        if name not in hints:
            raise UserError(f"{place}: has no type", hint=f"write {name}: str, for instance")
        one = type_schema(hints[name], place)
        if name in described:
            one["description"] = described[name]
        if parameter.default is parameter.empty:
            required.append(name)
        elif parameter.default is not None:
            one["default"] = _plain(parameter.default, place)
        properties[name] = one
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    return Tool(function.__name__, description, parameters, function)


def _plain(value: Any, place: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        raise UserError(f"{place}: its default is no JSON") from None


def type_schema(kind: Any, place: str) -> dict[str, Any]:
    """JSON schema of a Python type. `UserError` that names `place` for one that has none."""
    if kind is Any:
        return {}
    if kind in PLAIN:
        return {"type": PLAIN[kind]}
    if kind in (list, dict):
        return {"type": "array" if kind is list else "object"}
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return {"type": "array", "items": type_schema(inner[0], place)}
    if origin is dict and inner[0] is str:
        return {"type": "object", "additionalProperties": type_schema(inner[1], place)}
    if origin is Literal and all(type(one) in PLAIN for one in inner):
        names = {PLAIN[type(one)] for one in inner}
        return ({"type": names.pop()} if len(names) == 1 else {}) | {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        schemas = [type_schema(one, place) for one in inner]
        if all(list(one) == ["type"] for one in schemas):
            return {"type": [one["type"] for one in schemas]}
        return {"anyOf": schemas}
    name = getattr(kind, "__name__", str(kind))
    raise UserError(
        f"{place}: no JSON schema for the type {name}",
        hint="use str, int, float, bool, list, dict, Literal or a union of these",
    )


def _docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Description, and that of each parameter."""
    lines = (inspect.getdoc(function) or "").splitlines()
    first = next((i for i, line in enumerate(lines) if SECTION.match(line)), len(lines))
    described: dict[str, str] = {}
    section = last = ""
    for line in lines[first:]:
        if header := SECTION.match(line):
            section, last = header[1], ""
        elif section in ("Args", "Arguments", "Parameters"):
            if found := DESCRIBED.match(line):
                last = found[1]
                described[last] = found[2].strip()
            elif last and line.strip():
                described[last] += " " + line.strip()
    return " ".join(" ".join(lines[:first]).split()), described
