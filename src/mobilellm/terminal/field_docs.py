"""What dataclasses say of their fields: the string below each field, read from the source.

The help and docs/recipe.md are made of it:

field_docs(TrainSection)["steps"]       # "Optimizer steps."
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from typing import Annotated, Any, Literal


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string below it, on one line. Fields without one are left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    found = {}
    for node, below in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            found[node.target.id] = " ".join(below.value.value.split())
    return found


def explain(cls: type) -> None:
    """Give tyro these strings without the line breaks that they have in the source.

    tyro keeps the break before an indented line, which leaves single words in the help and offers
    parts of sentences as completions. So each field gets its text in its annotation; dataclasses
    among the fields are explained as well.
    """
    import tyro

    docs = field_docs(cls)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            explain(hint)
        elif name in docs:
            cls.__annotations__[name] = Annotated[hint, tyro.conf.arg(help=docs[name])]


def type_name(hint: Any) -> str:
    """A field's type as a reader of recipes knows it: "integer", "text", "adamw or muon"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {type_name(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} x {type_name(arguments[0])}"
    if origin is dict:
        return "table"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(hint, "table")
