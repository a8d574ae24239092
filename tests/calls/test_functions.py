"""Functions of a user as tools: schemas as transformers makes them, and what running one gives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from mobilellm.calls.functions import read_tools, tool_of
from mobilellm.calls.schema import fault_of
from mobilellm.errors import UserError


def forecast(city: str, days: int = 1, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
    """The weather of the next days,
    in one line.

    Args:
        city: Name of the city,
            without the country.
        days: How many days.
        unit: The unit
    """
    return f"{city}: {days} days of rain, {unit}"


def order(items: list[str], table: dict[str, int], paid: bool, price: float) -> int:
    """Order.

    Args:
        items: What
        table: Where
        paid: Whether
        price: How much

    Returns:
        How many.
    """
    return len(items)


@pytest.mark.parametrize("function", [forecast, order])
def test_the_schema_is_that_of_transformers(function: Callable[..., Any]) -> None:
    from transformers.utils import get_json_schema

    theirs = get_json_schema(function)["function"]
    ours = tool_of(function).as_openai()["function"]
    assert ours["name"] == theirs["name"]
    assert ours["description"] == " ".join(theirs["description"].split())
    assert ours["parameters"]["required"] == theirs["parameters"]["required"]
    for name, expected in theirs["parameters"]["properties"].items():
        found = dict(ours["parameters"]["properties"][name])
        found.pop("default", None)
        expected["description"] = " ".join(expected["description"].split())
        assert found == expected, name


def optional(a: Optional[str] = None, b: int | float | None = None, c: str | list[int] = "x"):  # noqa: UP045
    pass


def test_unions_and_defaults() -> None:
    assert tool_of(optional).parameters == {
        "type": "object",
        "properties": {
            "a": {"type": ["string", "null"]},
            "b": {"type": ["integer", "number", "null"]},
            "c": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}],
                "default": "x",
            },
        },
    }
    assert tool_of(forecast).parameters["properties"]["days"]["default"] == 1


def no_type(a) -> None: ...  # type: ignore[no-untyped-def]
def other_type(a: Path) -> None: ...
def by_place(a: int, /) -> None: ...
def any_name(**a: int) -> None: ...
def any_number(*a: int) -> None: ...
def bad_default(a: Any = Path) -> None: ...  # type: ignore[assignment]
def number_keys(a: dict[int, str]) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (no_type, "no_type: parameter a: has no type; write a: str, for instance"),
        (other_type, "other_type: parameter a: no JSON schema for the type Path; use str"),
        (by_place, "by_place: parameter a: cannot be given by name"),
        (any_name, "any_name: parameter a: takes any name"),
        (any_number, "any_number: parameter a: cannot be given by name"),
        (bad_default, "bad_default: parameter a: its default is no JSON"),
        (number_keys, "number_keys: parameter a: no JSON schema for the type dict"),
    ],
)
def test_what_has_no_schema_is_one_line(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        tool_of(function)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"city": "Oslo"}, ""),
        ({"city": "Oslo", "days": 2, "unit": "fahrenheit"}, ""),
        ({}, "arguments: city is missing"),
        ({"city": 3}, "arguments: city: 3 is not string"),
        ({"city": "Oslo", "days": True}, "arguments: days: True is not integer"),
        ({"city": "Oslo", "days": 1.5}, "arguments: days: 1.5 is not integer"),
        ({"city": "Oslo", "unit": "kelvin"}, "arguments: unit: 'kelvin' is none of 'celsius', "),
        ({"city": "Oslo", "sky": "x"}, "arguments: sky is unknown"),
    ],
)
def test_arguments_are_checked_before_anything_runs(arguments: dict[str, Any], fault: str) -> None:
    schema = tool_of(forecast).parameters
    assert fault_of(arguments, schema, "arguments").startswith(fault)
    assert bool(fault_of(arguments, schema, "arguments")) == bool(fault)
    assert tool_of(forecast).run(arguments).startswith(f"error: {fault}" if fault else "Oslo: ")


FILE = """
print("imported")
from typing import Optional

def add(a: int, b: int = 1) -> int:
    "Add."
    print("adding\\x1b[2J")
    return a + b

def fail(kind: Optional[str]) -> None:
    if kind == "exit":
        raise SystemExit(3)
    raise ValueError("no\\nsecond line")

def much() -> str:
    return "x" * 50_000

def things() -> object:
    return {"a": [1, None], "when": object}

one = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tools.py").write_text(FILE)
    return tmp_path / "tools.py"


def test_tools_of_a_file_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = read_tools([f"{file}:add, fail,much,things"])
    assert list(tools) == ["add", "fail", "much", "things"]
    capsys.readouterr()
    assert tools["add"].run({"a": 2}) == "3"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "adding␛[2J\n")  # what it prints is no answer
    assert tools["fail"].run({"kind": None}) == "error: ValueError: no"
    assert tools["fail"].run({"kind": "exit"}) == "error: SystemExit: 3"
    assert tools["much"].run({}).endswith("xxx (cut off: 50,000 characters)")
    assert tools["things"].run({}).startswith('{"a": [1, null], "when": "<class')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{file}", "names no function; give FILE.py:function,..."),
        ("{file}:", "names no function"),
        ("{file}:subtract", "unknown function 'subtract'; known: add, fail, much, things"),
        ("{file}:one", "unknown function 'one'"),
        ("{file}:add,add", "add is given twice"),
        ("nowhere.py:add", "nowhere.py: no such file"),
        ("{bad}:add", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("{broken}:add", "cannot be imported (SyntaxError"),
    ],
)
def test_bad_tools_are_one_line(file: Path, text: str, said: str) -> None:
    for name, content in (("bad", "1 / 0"), ("broken", "def (")):
        (file.parent / f"{name}.py").write_text(content)
    paths = {name: file.parent / f"{name}.py" for name in ("bad", "broken")}
    with pytest.raises(UserError) as refused:
        read_tools([text.format(file=file, **paths)])
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_nothing_is_imported_that_is_not_asked_for(file: Path) -> None:
    assert read_tools([]) == {}
    assert not [name for name in sys.modules if name == f"tools_{file.stem}_never"]
