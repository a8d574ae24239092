"""Chat templates: a conversation as the text that a model is trained on and asked with.

    template = ChatTemplate.of(tokenizer)               # its own, or ChatML
    template.render([{"role": "user", "content": "hi"}], add_generation_prompt=True).text

A template is Jinja text, as transformers and llama.cpp have it in `chat_template.jinja`, in
`tokenizer_config.json` or in a GGUF. What it is given, and what it can call, is what transformers
gives it, so that the text is the same; `template_sandbox` is where it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError, first_line
from mobilellm.tokenizer.template_sandbox import MAX_TEMPLATE, Marks, compile_template
from mobilellm.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]

# ChatML, with tools as the Hermes models write them: JSON in tags of plain text.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call functions. Their signatures, a JSON object a line:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\nTo call one, write:\\n<tool_call>\\n' }}
    {{- '{"name": "...", "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '\\n' if message.content or not loop.first }}
                {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
                {{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role != 'system' or not tools or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# What a template for tools must be able to write.
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "weather01",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}},
            }
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "weather01", "content": "rain"},
    {"role": "assistant", "content": "It rains."},
]
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
MARKER = re.compile(r"<\|[\w.:-]{1,60}\|>")  # how most families spell their special tokens
# Names under which a message's reasoning is passed; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
PRIVATE = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """Where `{% generation %}` says that the assistant speaks: from, to, in characters."""


class ChatTemplate:
    """A template, compiled, with the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str = "chat template"):
        """`tokens` are `bos_token`, `eos_token` and so on. `UserError` for broken templates."""
        self.source, self.where = source, where
        self.tokens = dict(tokens)
        self._compiled = compile_template(source, where)
        self._written: set[str] = set()  # what `check_written` found to be written

    @classmethod
    def of(cls, tokenizer: Tokenizer, file: Path | None = None, name: str = "") -> ChatTemplate:
        """The template in `file`, else the tokenizer's own, else ChatML.

        `file` may also be "chatml", or the name of one of the tokenizer's own. With `name`
        ("tool_use") the tokenizer's own of that name, where it has one. `UserError` for a file that
        cannot be read.
        """
        tokens = tokens_for_templates(tokenizer)
        if file is not None:
            known = {"chatml": CHATML, **tokenizer.named_templates}
            if str(file) in known and not file.exists():
                return cls(known[str(file)], tokens, str(file))
            return cls(read_template(file), tokens, str(file))
        own = tokenizer.named_templates.get(name, tokenizer.chat_template)
        if own is not None:
            return cls(own, tokens, f"{tokenizer.name}: chat template")
        return cls(CHATML, tokens, "ChatML")

    @classmethod
    def for_tools(cls, tokenizer: Tokenizer, file: Path | None = None) -> ChatTemplate:
        """The template for a conversation with tools: the one in `file`, else the tokenizer's own
        where it writes tools, calls and results, else ChatML.

        `UserError` where the one in `file` does not write them.
        """
        own = cls.of(tokenizer, file, "tool_use")
        try:
            own.check_written(CALLING, TOOLS)
        except UserError:
            if file is not None:
                raise
            return cls(CHATML, tokens_for_templates(tokenizer), "ChatML")
        return own

    def check_written(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> None:
        """`UserError` where the text is the same without the conversation's tools, without its
        calls, or without their results: a template made for talk alone passes over them."""
        called = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
        answered = [m for m in messages if m["role"] != "tool"]
        without = {
            "tools": (messages, None) if tools else None,
            "calls of functions": (called, tools) if called != list(messages) else None,
            "results of functions": (answered, tools) if len(answered) < len(messages) else None,
        }
        asked = {what: given for what, given in without.items() if given is not None}
        if asked.keys() <= self._written:
            return
        whole = self.render(messages, tools).text
        for what, given in asked.items():
            if self._text(*given) == whole:
                raise UserError(
                    f"{self.where}: does not write {what}, so that a model would not see them",
                    hint="give another with --template, or --template chatml",
                )
        self._written |= asked.keys()

    def _text(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> str | None:
        """The text, or None where the template refuses the conversation."""
        try:
            return self.render(messages, tools).text
        except UserError:
            return None

    @property
    def has_generation(self) -> bool:
        """Whether `{% generation %}` says in it what the assistant's text is."""
        return self._compiled.has_generation

    def markers(self) -> list[str]:
        """Special tokens that its text spells, in order: those of the form <|...|>."""
        return list(dict.fromkeys(MARKER.findall(self.source)))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation as text, and where in it the assistant speaks.

        `variables` are given to the template beside transformers' own (`enable_thinking`).
        `UserError` when the template raises, or exceeds what the sandbox allows.
        """
        given = [_aliased(message) for message in messages]
        values = {
            **self.tokens,
            **(variables or {}),
            "messages": given,
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if not self.has_generation:
            return Rendered(self._compiled.render(values), [])
        marks = Marks(*unused_characters([self.source, given, values["tools"]], 2))
        return _unmarked(self._compiled.render(values, marks), marks)


NO_TOOLS = "its chat template does not write tools; asked by ChatML instead"


def passed_over(tokenizer: Tokenizer, template: ChatTemplate) -> bool:
    """Whether the tokenizer has a template, and `template` is ChatML in its place."""
    return tokenizer.chat_template is not None and template.where == "ChatML"


def with_call_ids(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, with an id of nine letters and digits for each call that has none, and for each
    result the id of its call: some templates (Mistral's) refuse a conversation without."""
    found: list[dict[str, Any]] = []
    waiting: list[Any] = []
    number = 0
    for message in messages:
        made = dict(message)
        if calls := message.get("tool_calls"):
            ids = [call.get("id") or f"call{number + i:05d}" for i, call in enumerate(calls)]
            made["tool_calls"] = [{**call, "id": i} for call, i in zip(calls, ids, strict=True)]
            number, waiting = number + len(calls), ids
        elif message["role"] == "tool" and waiting:
            made["tool_call_id"] = answered = made.get("tool_call_id") or waiting[0]
            waiting = [i for i in waiting if i != answered]
        found.append(made)
    return found


def read_template(path: Path) -> str:
    """The text of a template. `UserError` for what cannot be read."""
    try:
        size = path.stat().st_size
        if size > 4 * MAX_TEMPLATE:
            raise UserError(f"{path}: {size} bytes, too large for a chat template")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


def tokens_for_templates(tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and `eos_token` as templates name them."""
    found = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {key: tokenizer.token(i) for key, i in found.items()}
    return {key: token for key, token in named.items() if token is not None}


def _aliased(message: Message) -> dict[str, Any]:
    """A message without what is null, its reasoning under the name that templates read."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def strings(value: Any) -> Iterator[str]:
    """Every string in nested lists and objects, their keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from strings(one)


def unused_characters(values: Iterable[Any], count: int) -> list[str]:
    """Characters of a private plane of Unicode that occur in none of the strings of `values`."""
    used = {found for text in strings(list(values)) for found in PRIVATE.findall(text)}
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    found = [character for character, _ in zip(free, range(count), strict=False)]
    if len(found) < count:
        raise UserError("a conversation that uses every private character of Unicode")
    return found


def _unmarked(text: str, marks: Marks) -> Rendered:
    """The text without the marks, and the spans between them."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    begun: list[int] = []
    length = 0
    for piece in re.split(f"([{marks.begin}{marks.end}])", text):
        if piece == marks.begin:
            begun.append(length)
        elif piece == marks.end:
            spans.append((begun.pop() if begun else 0, length))
        else:
            parts.append(piece)
            length += len(piece)
    return Rendered("".join(parts), [(a, b) for a, b in spans if a < b])
