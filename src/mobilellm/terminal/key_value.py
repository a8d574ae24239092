"""Tables on the command line: `--model.override num_hidden_layers=12 rope_theta=5e5`.

Each KEY=VALUE has a value as TOML writes it; what is no TOML is a string.
"""

from __future__ import annotations

import sys
from typing import Any, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


def parse(arguments: list[str]) -> dict[str, Any]:
    """The table of KEY=VALUE arguments. `ValueError`, which tyro shows as a usage error, for one
    without "="."""
    found: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r} is not KEY=VALUE")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def show(table: dict[str, Any]) -> list[str]:
    """The arguments that `parse` reads back."""
    import tomli_w

    return [
        f"{key}={tomli_w.dumps({'value': value}).partition('=')[2].strip()}"
        for key, value in table.items()
    ]


def key_value_registry() -> ConstructorRegistry:
    """tyro's own rules, and one for fields of type dict[str, Any]."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def table(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
        if info.type_origin is not dict or get_args(info.type) != (str, Any):
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE",
            instance_from_str=parse,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=show,
        )

    return registry
