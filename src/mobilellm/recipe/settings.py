"""Settings as frozen dataclasses: read from nested tables, every key, type and range checked, and
written back.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class TrainSection:
        steps: Annotated[int, AtLeast(1)] = 1000

    build(TrainSection, {"steps": 5}, "recipe.toml", "train.")

A range stands on the field it is the range of. A field whose name is a keyword of Python ends in an
underscore, which its key does not have.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from mobilellm.errors import UserError, unknown_name
from mobilellm.schema import Range


def ranges(cls: type) -> dict[str, Range]:
    """Field -> its range, of the fields that have one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Range)
    }


def check_ranges(section: Any, prefix: str) -> None:
    """`UserError` for the first value of a section that is outside its range; of a tuple, each
    number counts."""
    for name, allowed in ranges(type(section)).items():
        value = getattr(section, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and (complaint := allowed.complaint(number)):
                raise UserError(f"{prefix}{key_of(name)} = {number}: {complaint}")


def key_of(field: str) -> str:
    """The key that a field is written under."""
    return field.removesuffix("_")


def build(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> Any:
    """An instance of a dataclass from a table. `UserError` for an unknown key (naming the nearest),
    a wrong type, or a key without a default that is missing."""
    hints = typing.get_type_hints(cls)
    fields = {key_of(field.name): field for field in dataclasses.fields(cls)}
    known = {key: field.name for key, field in fields.items()}
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name("key", prefix + key, {prefix + name for name in known}, where)
        built[known[key]] = _convert(hints[known[key]], value, where, prefix + key)
    absent = dataclasses.MISSING
    for key, field in fields.items():
        if field.name not in built and field.default is field.default_factory is absent:
            raise UserError(f"{where}: {prefix}{key} is missing")
    return cls(**built)


def plain(section: Any) -> dict[str, Any]:
    """Key -> value of a section, as TOML has them: lists for tuples, and no key for what is not
    given."""
    return {
        key_of(name): list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(section).items()
        if value is not None
    }


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: [{name}] must be a table")
        return build(hint, value, where, name + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # only "X | None" occurs, and TOML has no null
        given = next(a for a in arguments if a is not type(None))
        return _convert(given, value, where, name)
    if origin is Literal:
        if value not in arguments:
            raise unknown_name(f"{name} =", str(value), [str(a) for a in arguments], where)
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}: {name} must be a table")
        return {k: _convert(arguments[1], v, where, f"{name}.{k}") for k, v in value.items()}
    if origin is tuple and arguments[-1] is Ellipsis:
        if not isinstance(value, list):
            raise UserError(f"{where}: {name} must be a list")
        return tuple(_convert(arguments[0], entry, where, name) for entry in value)
    if origin is tuple:
        if not isinstance(value, list) or len(value) != len(arguments):
            raise UserError(f"{where}: {name} must be a list of {len(arguments)} numbers")
        return tuple(_convert(a, v, where, name) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{where}: {name} = {value!r} must be of type {hint.__name__}")
    return value
