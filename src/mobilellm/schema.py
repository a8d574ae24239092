"""What a file of ours must hold, checked against the types that the code says it holds.

    class Entry(TypedDict):
        size: int
        sha256: str

    listed = checked(read_json(path), dict[str, Entry], str(path))
    # UserError: RUN/checksums.json: "model.safetensors".size is "12", must be a whole number

The types are those that mypy checks the readers with: typed dictionaries and dataclasses, lists,
tuples, dictionaries by names, unions, literals and plain values. A typed dictionary may hold more
keys than its type names, and keeps them; a dataclass may not. `Annotated[int, AtLeast(0)]` bounds a
number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import typing_extensions

from mobilellm.errors import UserError

T = TypeVar("T")
MAX_SHOWN = 60  # characters of a value that a message shows
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


@dataclass(frozen=True)
class AtLeast:
    """The smallest value a number may have."""

    least: float

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, or none."""
        fits = self.least <= value < math.inf
        return None if fits else f"must be at least {self.least:g}"


@dataclass(frozen=True)
class Between:
    """The smallest and the largest value a number may have."""

    low: float
    high: float

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, or none."""
        fits = self.low <= value <= self.high
        return None if fits else f"must be from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Above:
    """A number that every value must exceed."""

    limit: float

    def complaint(self, value: float) -> str | None:
        """What is wrong with `value`, or none."""
        fits = self.limit < value < math.inf
        return None if fits else f"must be a number above {self.limit:g}"


Range = AtLeast | Between | Above


class _MismatchError(Exception):
    """Where a value is of another type, and what is wanted there."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(place, fault)
        self.place, self.fault = place, fault


def checked(value: Any, kind: type[T], where: str, *, hint: str = "") -> T:
    """The value itself, known to be of the type `kind`. `UserError` names the first place that is
    not, with `where` before it."""
    fault = fault_of(value, kind)
    if fault:
        raise UserError(f"{where}: {fault}", hint=hint or "the file is damaged, or was edited")
    return cast(T, value)


def fault_of(value: Any, kind: Any) -> str:
    """The first thing in a value that is not as its type says; empty where all is."""
    try:
        _check(value, kind, "")
    except _MismatchError as error:
        return f"{error.place or 'its content'} {error.fault}".replace("\n", " ")
    return ""


def _check(value: Any, kind: Any, place: str) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return
    if origin is typing.Annotated:
        _check(value, arguments[0], place)
        for extra in arguments[1:]:
            if isinstance(extra, Range) and value is not None and (fault := extra.complaint(value)):
                raise _MismatchError(place, f"is {value}, {fault}")
    elif origin is typing.Union or origin is types.UnionType:
        _check_union(value, arguments, place)
    elif origin is typing.Literal:
        if value not in arguments:
            known = ", ".join(map(repr, arguments))
            raise _MismatchError(place, f"is {_shown(value)}, must be one of {known}")
    elif origin in (list, Sequence):
        _need(value, list, place)
        for number, item in enumerate(value):
            _check(item, arguments[0], f"{place}[{number}]")
    elif origin is tuple:
        _check_tuple(value, arguments, place)
    elif origin in (dict, Mapping):
        _need(value, dict, place)
        for name, item in value.items():
            _check(item, arguments[1], _inside(place, name))
    elif typing_extensions.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        _need(value, dict, place)
        fields = _fields(cast(Any, kind))
        for name, (wanted, required) in fields.items():
            if name in value:
                _check(value[name], wanted, _inside(place, name))
            elif required:
                raise _MismatchError(_inside(place, name), "is missing")
        if dataclasses.is_dataclass(kind):  # which cannot be made with more
            for name in value.keys() - fields.keys():
                raise _MismatchError(_inside(place, name), "is unknown")
    else:
        _need(value, dict if origin is dict else kind, place)


def _check_union(value: Any, kinds: Sequence[Any], place: str) -> None:
    """The fault is that of the kind that fits the value's own type best: the deepest place."""
    faults = []
    for kind in kinds:
        try:
            return _check(value, kind, place)
        except _MismatchError as error:
            faults.append(error)
    raise max(faults, key=lambda fault: len(fault.place))


def _check_tuple(value: Any, kinds: Sequence[Any], place: str) -> None:
    _need(value, list, place)
    each = [kinds[0]] * len(value) if kinds[-1] is ... else list(kinds)
    if len(each) != len(value):
        raise _MismatchError(place, f"has {len(value)} parts, must have {len(each)}")
    for number, (item, kind) in enumerate(zip(value, each, strict=True)):
        _check(item, kind, f"{place}[{number}]")


def _need(value: Any, kind: type, place: str) -> None:
    """A bool is no number here, and a whole number is one; JSON has no infinity."""
    if kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    elif kind is int:
        fits = type(value) is int
    else:
        fits = isinstance(value, kind)
    if not fits:
        wanted = WORDS.get(kind, kind.__name__)
        raise _MismatchError(place, f"is {_shown(value)}, must be {wanted}")


def _inside(place: str, name: str) -> str:
    shown = name if name.isidentifier() else _shown(name)
    return f"{place}.{shown}" if place else shown


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, whether it must be there) of a typed dictionary or a dataclass."""
    hints = typing_extensions.get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        empty = dataclasses.MISSING
        return {
            field.name: (
                hints[field.name], field.default is empty and field.default_factory is empty
            )
            for field in dataclasses.fields(kind)
        }  # fmt: skip
    total = bool(getattr(kind, "__total__", True))
    found: dict[str, tuple[Any, bool]] = {}
    for name, hint in hints.items():
        origin: Any = typing_extensions.get_origin(hint)
        if origin in (typing_extensions.NotRequired, typing_extensions.Required):
            (wanted,) = typing_extensions.get_args(hint)
            found[name] = (wanted, origin is typing_extensions.Required)
        else:
            found[name] = (hint, total)
    return found
