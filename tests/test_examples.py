"""The examples in docstrings, README and docs call what exists, with arguments that it takes.

They are read and not run: names are looked up, and each call is bound to the signature of what it
calls. The type of a variable is that of what the example assigns to it, or what such a variable is
everywhere here (`network` is a Network).
"""

from __future__ import annotations

import ast
import builtins
import collections.abc
import contextlib
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mobilellm
from mobilellm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(mobilellm.__file__).parent
USUAL = {
    "config": ("mobilellm.model.config", "ModelConfig"),
    "data": ("mobilellm.data.token_folder", "TokenFolder"),
    "network": ("mobilellm.model.network", "Network"),
    "recipe": ("mobilellm.recipe.recipe", "Recipe"),
    "tokenizer": ("mobilellm.tokenizer.tokenizer", "Tokenizer"),
}
UNKNOWN = object()


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring without the indentation of what it describes; what is indented more keeps
    that."""
    text = ast.get_docstring(node, clean=False)
    if text is None:
        return ""
    base = " " * node.body[0].col_offset
    return "\n".join(line.removeprefix(base) for line in text.splitlines())


def blocks(text: str) -> Iterator[str]:
    """What may be an example in a docstring: indented blocks, and paragraphs at the left edge.

    ruff takes away the indentation of an example when nothing follows it at the left edge.
    """
    block: list[str] = []
    for line in [*text.splitlines()[1:], "end"]:
        if line.startswith("    ") or (block and not line.strip()):
            block.append(line)
        elif block:
            yield textwrap.dedent("\n".join(block)).strip()
            block = []
    yield from re.split(r"\n\s*\n", "\n".join(text.splitlines()[1:]).strip())


# A line of code at the left edge.
CODE = re.compile(
    r"(\w+(, \w+)* = [\w.]+\(.*|with \w+\(.*\).*:|for \w+ in .*:|[\w.]+\(.*\)\s+#.*"
    r"|\w+\.\w+\(.*\))"
)


def parsed(block: str) -> ast.Module | None:
    """A block as Python, or none; "..." at the end of a call stands for more arguments."""
    with contextlib.suppress(SyntaxError):
        return ast.parse(re.sub(r",\s*\.\.\.\)", ", **more)", block))
    return None


def examples() -> Iterator[tuple[str, str, str]]:
    """(where, module, code) of every example that is Python."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for block in dict.fromkeys(blocks(docstring(node))):
                    tree = parsed(block)
                    if tree and any(isinstance(n, ast.Call) for n in ast.walk(tree)):
                        where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', '')}"
                        yield where.rstrip(":"), module_name(path), block
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
            yield path.name, "mobilellm", block


EXAMPLES = list(examples())


class Reader:
    """Follows an example statement by statement, and keeps what is wrong with its calls."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.known: dict[str, Any] = {}
        """Name -> what it is: a module, class, function, or `Instance`."""
        self.complaints: list[str] = []

    def read(self, tree: ast.Module) -> list[str]:
        """The complaints about an example."""
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.take_import(node)
        for statement in tree.body:
            self.take(statement)
        return self.complaints

    def take_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name
            try:
                if isinstance(node, ast.Import):
                    self.known[name.split(".")[0]] = importlib.import_module(
                        alias.name.split(".")[0]
                    )
                else:
                    found = importlib.import_module(str(node.module))
                    self.known[name] = getattr(found, alias.name)
            except (ImportError, AttributeError) as error:
                ours = isinstance(node, ast.ImportFrom) and str(node.module).startswith("mobilellm")
                if ours:
                    self.complaints.append(str(error))
                self.known[name] = UNKNOWN

    def take(self, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call):
                self.check(node)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.value(node)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            self.known[statement.targets[0].id] = self.value(statement.value)
        elif isinstance(statement, ast.With):
            for item in statement.items:
                if isinstance(item.optional_vars, ast.Name):
                    self.known[item.optional_vars.id] = self.value(item.context_expr)
            for inner in statement.body:
                self.take(inner)

    def value(self, node: ast.expr) -> Any:
        """What an expression is, as far as it is known."""
        if isinstance(node, ast.Name):
            return self.named(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if inspect.isfunction(owner):  # a variable that happens to have a function's name
                owner = UNKNOWN
            return self.attribute(owner, node.attr)
        if isinstance(node, ast.Call):
            return result(self.value(node.func))
        return UNKNOWN

    def named(self, name: str) -> Any:
        if name in self.known:
            return self.known[name]
        if hasattr(self.module, name):
            return getattr(self.module, name)
        if name == "Path":
            return Path
        if name in USUAL:
            where, cls = USUAL[name]
            return Instance(getattr(importlib.import_module(where), cls))
        return UNIQUE.get(name, UNKNOWN)

    def attribute(self, owner: Any, name: str) -> Any:
        cls = owner.cls if isinstance(owner, Instance) else owner
        if isinstance(cls, ModuleType):
            return self.of_module(cls, name)
        if cls is UNKNOWN or not ours(cls):
            return UNKNOWN
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, property):
            hint = hints(found.fget).get("return")
            return Instance(hint) if isinstance(hint, type) else UNKNOWN
        if isinstance(owner, Instance) and inspect.isfunction(found):
            return Bound(found)
        if found is not None and hasattr(cls, name):
            return getattr(cls, name)
        if isinstance(cls, type) and has_field(cls, name):
            hint = hints(cls).get(name)
            return Instance(hint) if isinstance(hint, type) else UNKNOWN
        self.complaints.append(f"{getattr(cls, '__name__', cls)} has no {name}")
        return UNKNOWN

    def of_module(self, module: ModuleType, name: str) -> Any:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{module.__name__}.{name}")
        if not hasattr(module, name):
            self.complaints.append(f"{module.__name__} has no {name}")
        return getattr(module, name, UNKNOWN)

    def check(self, call: ast.Call) -> None:
        called = self.value(call.func)
        if isinstance(call.func, ast.Name) and called is UNKNOWN:
            if not hasattr(builtins, call.func.id) and call.func.id not in self.known:
                self.complaints.append(f"there is no {call.func.id}")
            return
        function = called.function if isinstance(called, Bound) else called
        if called is UNKNOWN or not callable(function) or not ours(function):
            return
        if any(isinstance(argument, ast.Starred) for argument in call.args):
            return
        arguments = [None] * (len(call.args) + isinstance(called, Bound))
        names = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        open_end = len(names) < len(call.keywords)
        signature = inspect.signature(function)
        try:
            (signature.bind_partial if open_end else signature.bind)(*arguments, **names)
        except TypeError as error:
            self.complaints.append(f"{ast.unparse(call)}: {error}")


@dataclasses.dataclass(frozen=True)
class Instance:
    """An object of a class."""

    cls: Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A method of an object."""

    function: Callable[..., Any]


def ours(what: Any) -> bool:
    return str(getattr(what, "__module__", getattr(what, "__name__", ""))).startswith("mobilellm")


def hints(what: Any) -> dict[str, Any]:
    with contextlib.suppress(Exception):
        return typing.get_type_hints(what)
    return {}


def has_field(cls: type, name: str) -> bool:
    """Whether objects of a class have a field: annotated, or set by one of its methods."""
    if any(name in getattr(base, "__annotations__", {}) for base in cls.__mro__):
        return True
    own = [base for base in cls.__mro__ if ours(base)]
    return any(re.search(rf"\bself\.{name}\b", inspect.getsource(base)) for base in own)


def result(called: Any) -> Any:
    """What a call gives, by its annotation."""
    function = called.function if isinstance(called, Bound) else called
    if isinstance(function, type) and ours(function):
        return Instance(function)
    hint = hints(function).get("return") if callable(function) and ours(function) else None
    if typing.get_origin(hint) in (collections.abc.Iterator, contextlib.AbstractContextManager):
        wrapped = getattr(function, "__wrapped__", None)  # a context manager gives what it yields
        hint = typing.get_args(hint)[0] if wrapped else None
    return Instance(hint) if isinstance(hint, type) else UNKNOWN


def unique() -> dict[str, Any]:
    """Classes and functions of ours by name, where one module alone defines such a name."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found.setdefault(node.name, set()).add(module_name(path))
    table: dict[str, Any] = {}
    for name, modules in found.items():
        if len(modules) == 1 and not name.startswith("_"):
            with contextlib.suppress(ImportError, UserError):  # an optional package
                table[name] = getattr(importlib.import_module(next(iter(modules))), name)
    return table


UNIQUE = unique()


@pytest.mark.parametrize(("where", "module", "code"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_examples_call_what_there_is(where: str, module: str, code: str) -> None:
    tree = parsed(code)
    assert tree is not None, where
    try:
        found = importlib.import_module(module)
    except (ImportError, UserError) as error:
        pytest.skip(f"{module}: {error}")
    assert Reader(found).read(tree) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_no_example_has_run_into_its_prose(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for paragraph in re.split(r"\n\s*\n", docstring(node)):
                if any(CODE.fullmatch(line) for line in paragraph.splitlines()):
                    assert parsed(paragraph), paragraph


def test_many_examples_are_seen() -> None:
    assert len(EXAMPLES) >= 50
    assert {"README.md", "data.md", "evaluation.md"} <= {where for where, _, _ in EXAMPLES}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("perplexity(network, tokens, 5, sequence_len=4)", "sequence_len"),
        ("network.generat([1])", "Network has no generat"),
        ("import mobilellm\nmobilellm.lode('x')", "mobilellm has no lode"),
        ("network.generate([1], max_new=3)", "max_new"),
        ("Trayner(recipe)", "there is no Trayner"),
        ("from mobilellm.files import nothing", "nothing"),
        (
            "score = perplexity(network, tokens, 5, sequence_length=4)\nscore.bits",
            "Score has no bits",
        ),
    ],
)
def test_what_there_is_not_is_found(code: str, words: str) -> None:
    module = importlib.import_module("mobilellm.evaluate.perplexity")
    tree = parsed(code)
    assert tree is not None
    (complaint,) = set(Reader(module).read(tree))
    assert words in complaint
