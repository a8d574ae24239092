"""What is read back is what its type says, or one line that names the place."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import pytest
from typing_extensions import NotRequired

from mobilellm.errors import UserError
from mobilellm.schema import AtLeast, checked, fault_of


class Entry(TypedDict):
    size: Annotated[int, AtLeast(0)]
    share: float
    kind: Literal["a", "b"]
    note: NotRequired[str]


@dataclass
class State:
    step: int
    guard: tuple[float, ...] = ()
    pair: tuple[int, str] = (0, "")
    entries: dict[str, Entry] = field(default_factory=dict)
    maybe: int | None = None


ENTRY: dict[str, Any] = {"size": 1, "share": 0.5, "kind": "a"}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"step": 1}, ""),
        ({"step": 1, "entries": {"x": ENTRY}, "maybe": None, "guard": [0, 1.5]}, ""),
        ({"step": 1, "entries": {"x": ENTRY | {"more": 5}}}, ""),  # a typed dictionary keeps more
        ({}, "step is missing"),
        ([], "its content is [], must be an object"),
        ({"step": "1"}, "step is '1', must be a whole number"),
        ({"step": True}, "step is True, must be a whole number"),
        ({"step": 1.0}, "step is 1.0, must be a whole number"),
        ({"step": [1]}, "step is [1], must be a whole number"),
        ({"step": 1, "more": 2}, "more is unknown"),
        ({"step": 1, "guard": [0, None]}, "guard[1] is None, must be a number"),
        ({"step": 1, "guard": 5}, "guard is 5, must be a list"),
        ({"step": 1, "pair": [1]}, "pair has 1 parts, must have 2"),
        ({"step": 1, "pair": ["a", "b"]}, "pair[0] is 'a', must be a whole number"),
        ({"step": 1, "maybe": "x"}, "maybe is 'x', must be a whole number"),
        ({"step": 1, "entries": {"x": ENTRY | {"size": -1}}}, "entries.x.size is -1, must be at"),
        ({"step": 1, "entries": {"x": ENTRY | {"kind": "c"}}}, "entries.x.kind is 'c', must be"),
        ({"step": 1, "entries": {"x": ENTRY | {"share": "y"}}}, "entries.x.share is 'y', must"),
        ({"step": 1, "entries": {"a\nb": {}}}, "entries.'a\\nb'.size is missing"),
    ],
)
def test_the_first_fault_is_named_with_its_place(value: Any, fault: str) -> None:
    found = fault_of(value, State)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)
    assert "\n" not in found


def test_a_value_is_given_back_as_it_is() -> None:
    value = {"step": 1}
    assert checked(value, State, "x.json") is value
    with pytest.raises(UserError, match=r"x.json: step is missing; the file is damaged"):
        checked({}, State, "x.json")


def test_a_long_value_is_cut_and_nesting_is_bounded() -> None:
    assert len(fault_of({"step": "x" * 10_000}, State)) < 150
    nested: Any = 1
    for _ in range(900):
        nested = [nested]
    assert fault_of({"step": nested}, State)
