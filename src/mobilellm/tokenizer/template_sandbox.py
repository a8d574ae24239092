"""The sandbox in which chat templates run: Jinja2's, with a limit on size and time.

    template = compile_template("{{ messages[0].content }}", "chat_template.jinja")
    template.render({"messages": [{"content": "hi"}]})

A chat template comes with a model, so it is other people's program. Jinja2's immutable sandbox
keeps it from attributes, files and changes to what it is given; this one also counts its steps,
limits every text that it makes, and ends it after some seconds. `{% generation %}` wraps what it
holds in two characters (`Marks`) by which the caller finds it again.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mobilellm.errors import UserError, first_line

MAX_TEMPLATE = 1 << 20  # characters of a template; the largest known are a twentieth of that
MAX_TEXT = 1 << 22  # characters of anything that a template makes
MAX_STEPS = 1 << 17  # turns of loops and calls of macros
MAX_SECONDS = 10.0
WIDTH = re.compile(r"\d{5,}|\*")  # a width in a format string that asks for very long text
FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")
# Filters that make text of any length, or take time, and that no chat template needs.
NO_FILTERS = ("center", "format", "pprint", "slice", "batch", "urlize", "wordwrap", "xmlattr")


class Marks(NamedTuple):
    """Two characters that stand around what `{% generation %}` holds."""

    begin: str
    end: str


NO_MARKS = Marks("", "")


class LimitError(TemplateError):
    """A template asked for more than it may have."""


def size_of(value: Any, limit: int = MAX_TEXT) -> int:
    """About how many characters a value has when it is written out. `LimitError` above `limit`."""
    total, stack = 0, [value]
    while stack:
        one = stack.pop()
        total += len(one) + 2 if isinstance(one, str) else 8
        if isinstance(one, dict):
            stack.extend(one.keys())
            stack.extend(one.values())
        elif isinstance(one, (list, tuple, set)):
            stack.extend(one)
        if total > limit:
            raise LimitError(f"it makes a text of more than {limit} characters")
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. One thread at a time may render."""

    intercepted_binops = frozenset(["*", "+", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        self.marks = NO_MARKS
        self.steps, self.deadline = 0, 0.0
        for name in NO_FILTERS:
            self.filters.pop(name, None)
        self.filters["tojson"] = to_json
        self.filters["join"] = _joined(self.filters["join"])
        self.filters["indent"] = _indented(self.filters["indent"])
        self.filters["replace"] = _replaced(self.filters["replace"])
        self.globals = {
            "range": self.globals["range"],
            "dict": PlainDict(),
            "namespace": PlainNamespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self.finalize = self.finished

    def begin(self, marks: Marks) -> None:
        """Start counting for one rendering."""
        self.marks, self.steps, self.deadline = marks, 0, time.monotonic() + MAX_SECONDS

    def step(self) -> str:
        """Count a turn of a loop. `LimitError` when there were too many, or it took too long."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise LimitError(f"its loops take more than {MAX_STEPS} turns")
        if not self.steps & 0xFF and time.monotonic() > self.deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")
        return ""

    @staticmethod
    def finished(value: Any) -> Any:
        """What is printed, which is limited before it becomes text."""
        size_of(value)
        return value

    @staticmethod
    def joined(*values: Any) -> str:
        """What `~` makes."""
        for value in values:
            size_of(value)
        parts = [str(value) for value in values]
        size_of(parts)
        return "".join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator, refused where its result would be too large."""
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(text, (str, list, tuple)) and isinstance(times, int):
                    size_of("") if times < 1 else _limit(len(text) * times)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _limit(left.bit_length() * abs(right))
        elif operator == "+":
            if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                _limit(len(left) + len(right))
        elif isinstance(left, str):
            if WIDTH.search(left):
                raise LimitError("its format string asks for a very long text")
            size_of(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call, refused where its result would be too large."""
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name in PADDING:
                _limit(max((a for a in args if isinstance(a, int)), default=8) * (len(text) + 1))
            elif name in ("format", "format_map"):
                if WIDTH.search(text):
                    raise LimitError("its format string asks for a very long text")
                size_of([args, kwargs])
            elif name == "replace" and len(args) > 1 and isinstance(args[1], str):
                _limit((len(text) + 1) * max(1, len(args[1])), MAX_TEXT << 8)
            elif name == "join":
                args = tuple(list(a) if not isinstance(a, (str, list, tuple)) else a for a in args)
                for one in args:
                    size_of(one)
                    _limit(len(text) * len(one))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            size_of(result)
        return result


def _limit(size: int, most: int = MAX_TEXT) -> None:
    if size > most:
        raise LimitError(f"it makes a text of more than {most} characters")


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag and what it holds."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        marks = self.environment.marks  # type: ignore[attr-defined]
        return f"{marks.begin}{caller()}{marks.end}"

    def _step(self) -> str:
        return self.environment.step()  # type: ignore[attr-defined]

    def _joined(self, *values: Any) -> str:
        return self.environment.joined(*values)  # type: ignore[attr-defined]


def raise_exception(message: Any) -> None:
    """What a template calls for a conversation that it cannot render."""
    raise TemplateError(str(message))


def strftime_now(form: str) -> str:
    """The time now, as a template wants it written."""
    if WIDTH.search(form) or len(form) > 1000:
        raise LimitError("its time format asks for a very long text")
    return datetime.datetime.now().strftime(form)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON by the settings that transformers has in templates: no HTML escapes, UTF-8 as it is."""
    size_of(value)
    if isinstance(indent, int):
        _limit(indent, 64)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _joined(original: Callable[..., str]) -> Callable[..., str]:
    @jinja2.pass_eval_context
    def join(context: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        values = list(value)
        size_of(values)
        _limit(len(str(d)) * len(values))
        return original(context, values, d, attribute)

    return join


def _indented(original: Callable[..., str]) -> Callable[..., str]:
    def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        wide = len(width) if isinstance(width, str) else width
        _limit(wide * (1 + str(text).count("\n")) + len(str(text)))
        return original(text, width, first, blank)

    return indent


def _replaced(original: Callable[..., str]) -> Callable[..., str]:
    @jinja2.pass_eval_context
    def replace(context: Any, text: str, old: str, new: str, count: int | None = None) -> str:
        _limit((len(str(text)) + 1) * max(1, len(str(new))), MAX_TEXT << 8)
        result = original(context, text, old, new, count)
        _limit(len(result))
        return result

    return replace


class PlainDict:
    """`dict` for templates, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class PlainNamespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {str(name)[:40]!r}")


class CompiledTemplate:
    """A template that can be rendered again and again."""

    def __init__(self, sandbox: Sandbox, template: jinja2.Template, where: str, marks: bool):
        self.sandbox, self.template, self.where = sandbox, template, where
        self.has_generation = marks
        """Whether `{% generation %}` says what the assistant's text is."""

    def render(self, values: Mapping[str, Any], marks: Marks = NO_MARKS) -> str:
        """The text. `UserError` when the template raises, asks for what the sandbox refuses, or
        exceeds its limits."""
        self.sandbox.begin(marks)
        parts: list[str] = []
        size = 0
        try:
            for part in self.template.generate(**values):
                size += len(part)
                _limit(size)
                parts.append(part)
        except SecurityError as error:
            raise UserError(
                f"{self.where}: the sandbox refuses what it asks for ({first_line(error)})",
                hint="give another with --template",
            ) from None
        except LimitError as error:
            raise UserError(
                f"{self.where}: {first_line(error)}", hint="give another with --template"
            ) from None
        except RecursionError:
            raise UserError(f"{self.where}: it calls itself without end") from None
        except MemoryError:
            raise UserError(f"{self.where}: it asks for more memory than there is") from None
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"{self.where}: it cannot render this conversation ({first_line(error)})"
            ) from None
        return "".join(parts)


def compile_template(source: str, where: str) -> CompiledTemplate:
    """A template made ready. `UserError` for one that is too large or broken, naming the line."""
    if len(source) > MAX_TEMPLATE:
        raise UserError(f"{where}: {len(source)} characters, the limit is {MAX_TEMPLATE}")
    sandbox = Sandbox()
    extension = sandbox.extensions[Generation.identifier]
    try:
        tree = sandbox.parse(source)
        marks = any(
            isinstance(node.call.node, nodes.ExtensionAttribute)
            for node in tree.find_all(nodes.CallBlock)
        )
        _bounded(tree, extension)
        template = jinja2.Template.from_code(sandbox, sandbox.compile(tree), sandbox.globals.copy())
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {first_line(error)}") from None
    except TemplateError as error:
        raise UserError(f"{where}: {first_line(error)}") from None
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply") from None
    return CompiledTemplate(sandbox, template, where, marks)


def _bounded(tree: nodes.Template, extension: Extension) -> None:
    """Count every turn of a loop and every call of a macro, and limit what `~` makes."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        count = nodes.ExprStmt(extension.call_method("_step"))
        node.body.insert(0, count.set_lineno(node.lineno))  # type: ignore[attr-defined]
    _replace_concat(tree, extension)
    tree.set_environment(extension.environment)


def _replace_concat(node: nodes.Node, extension: Extension) -> None:
    """Put a call in the place of each `~` below `node`."""
    for name in node.fields:
        value = getattr(node, name)
        if isinstance(value, list):
            setattr(node, name, [_without_concat(one, extension) for one in value])
        else:
            setattr(node, name, _without_concat(value, extension))


def _without_concat(value: Any, extension: Extension) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _replace_concat(value, extension)
    if isinstance(value, nodes.Concat):
        return extension.call_method("_joined", value.nodes).set_lineno(value.lineno)
    return value
