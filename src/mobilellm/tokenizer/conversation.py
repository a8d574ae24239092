"""A conversation as token ids, and which of them the assistant says.

    encoded = encode_conversation(tokenizer, template, messages, tools)
    encoded.ids, encoded.trained
    encode_prompt(tokenizer, template, messages)       # up to where the assistant is to speak

Ids and mask equal those of transformers' `apply_chat_template` with one difference: special tokens
that are spelled out in messages or tools are text. A user who types "<|im_end|>" does not end the
turn. To that end such text is broken by a private character before the template runs; only the
special tokens that the template itself writes are whole afterwards, and the character is taken out
again before anything is encoded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobilellm.errors import UserError, first_line
from mobilellm.tokenizer.chat_template import ChatTemplate, Message, unused_characters
from mobilellm.tokenizer.special_tokens import renamed_tokens, special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation in tokens."""

    ids: list[int]
    trained: list[bool]
    """Of each token, whether the assistant says it."""
    bytes: int
    """UTF-8 bytes of what the assistant says; special tokens have none."""


@dataclass(frozen=True)
class Guarded:
    """Messages and tools whose special tokens are broken, and the character that breaks them."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    breaker: str


def encode_conversation(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools | None = None,
) -> EncodedConversation:
    """Ids of a whole conversation, and which of them are the assistant's.

    The assistant's are what `{% generation %}` holds; of a template without it, what each of its
    turns adds to the text before, up to the special token that ends the turn. `UserError` for a
    template whose text of the first turns changes when more follow, since a model would then be
    asked with a text that it was not trained on.
    """
    guarded = _guarded(tokenizer, template, messages, tools)
    rendered = template.render(guarded.messages, guarded.tools)
    turns = _turns(template, guarded, rendered.text)
    spans = rendered.spans
    if not template.has_generation:
        spans = [_ended(tokenizer, rendered.text, span) for span in turns]
    ids, offsets, said = _encode(tokenizer, rendered.text, spans, guarded.breaker)
    trained = [False] * len(ids)
    at = 0
    for begin, end in said.spans:
        while at < len(ids) and offsets[at][1] <= begin:
            at += 1
        i = at
        while i < len(ids) and offsets[i][0] < end:
            trained[i] = offsets[i][0] < offsets[i][1]
            i += 1
    return EncodedConversation(ids, trained, said.bytes)


def encode_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools | None = None,
    *,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation up to where the assistant is to speak."""
    guarded = _guarded(tokenizer, template, messages, tools)
    text = template.render(
        guarded.messages, guarded.tools, add_generation_prompt=True, variables=variables
    ).text
    return _encode(tokenizer, text, [], guarded.breaker)[0]


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The special token with which the template ends the assistant's turn, or None where it has
    none."""
    asked: list[Message] = [{"role": "user", "content": "question"}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": "answer"}]
    before = template.render(asked, add_generation_prompt=True).text
    after = template.render(answered).text
    if not after.startswith(before):
        before = after[: after.rfind("answer")]
    found = _special_pattern(tokenizer).search(after, len(before))
    return None if found is None else special_tokens(tokenizer)[found.group()]


def ends_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """Tokens at which an answer ends: the template's end of turn, and the end of text."""
    return {i for i in (end_of_turn(tokenizer, template), tokenizer.eos_id) if i is not None}


def _guarded(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], tools: Tools | None
) -> Guarded:
    """Break every special token that is spelled out in messages and tools.

    A text that ends as a special token begins, or begins as one ends, is kept apart from what the
    template puts beside it.
    """
    pattern = _special_pattern(tokenizer)
    begins, ends = _partial_patterns(tokenizer)
    breaker = unused_characters([template.source, list(messages), list(tools or ())], 3)[2]

    def whole(text: str) -> str:
        return pattern.sub(lambda found: found.group()[0] + breaker + found.group()[1:], text)

    def broken(text: str) -> str:
        if not text:
            return text
        text = whole(text)
        if begins.search(text):
            text += breaker
        return breaker + text if ends.match(text) else text

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return broken(value)
        if isinstance(value, Mapping):
            return {
                whole(key) if isinstance(key, str) else key: one if key == "role" else walk(one)
                for key, one in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [walk(one) for one in value]
        return value

    return Guarded(
        [walk(message) for message in messages],
        None if tools is None else [walk(tool) for tool in tools],
        breaker,
    )


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Any special token, the longest first."""
    tokens = sorted(special_tokens(tokenizer), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


@functools.lru_cache(maxsize=8)
def _partial_patterns(tokenizer: Tokenizer) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(a beginning of a special token at the end of a text, an end of one at its beginning)."""
    tokens = special_tokens(tokenizer)
    begins = sorted({t[:n] for t in tokens for n in range(2, len(t))}, key=len, reverse=True)
    ends = sorted({t[-n:] for t in tokens for n in range(2, len(t))}, key=len, reverse=True)
    first = re.compile(f"(?:{'|'.join(map(re.escape, begins)) or '(?!)'})\\Z")
    return first, re.compile("|".join(map(re.escape, ends)) or "(?!)")


def _turns(template: ChatTemplate, guarded: Guarded, text: str) -> list[Span]:
    """Where each assistant's turn stands in the text. `UserError` unless the text of the first
    messages, asked for a turn, begins the whole."""
    spans = []
    for i, message in enumerate(guarded.messages):
        if message.get("role") != "assistant":
            continue
        before, with_turn = guarded.messages[:i], guarded.messages[: i + 1]
        asked = template.render(before, guarded.tools, add_generation_prompt=True).text
        said = (
            text
            if i + 1 == len(guarded.messages)
            else template.render(with_turn, guarded.tools).text
        )
        if not (said.startswith(asked) and text.startswith(said)):
            raise UserError(
                f"{template.where}: the text of the first {i + 1} messages is not how that of all "
                f"{len(guarded.messages)} begins",
                hint="the model would be asked with text that it was not trained on: give another "
                "with --template",
            )
        spans.append((len(asked), len(said)))
    return spans


def _ended(tokenizer: Tokenizer, text: str, span: Span) -> Span:
    """A turn without the blanks after the special token that ends it."""
    begin, end = span
    last = None
    for last in _special_pattern(tokenizer).finditer(text, begin, end):  # noqa: B007
        pass
    if last is not None and not text[last.end() : end].strip():
        return begin, last.end()
    return span


@dataclass(frozen=True)
class _Said:
    spans: list[Span]
    bytes: int


def _encode(
    tokenizer: Tokenizer, text: str, spans: list[Span], breaker: str
) -> tuple[list[int], list[Span], _Said]:
    """Ids and offsets of a rendered text, and the spans in the offsets' characters.

    Without a breaker in it the text is encoded as it is, its special tokens as such. With one, the
    template's special tokens take names that no text has, and a copy of the tokenizer knows them
    by these.
    """
    special = _special_pattern(tokenizer)
    said = special.sub("", "".join(text[a:b] for a, b in spans)).replace(breaker, "")
    size = len(said.encode("utf-8", "surrogatepass"))
    if breaker not in text:
        encoding = _encoded(tokenizer.parsing, text, tokenizer)
        return encoding.ids, encoding.offsets, _Said(spans, size)
    fence = unused_characters([text], 1)[0]
    order = list(special_tokens(tokenizer))
    names = {token: f"{fence}{number}{fence}" for number, token in enumerate(order)}
    places = [0]  # of each character of `text`, and of its end, in what is encoded
    parts: list[str] = []
    pattern = re.compile(f"(?P<special>{special.pattern})|{breaker}")
    at = length = 0

    def keep(piece: str) -> None:
        nonlocal length
        parts.append(piece)
        places.extend(range(length + 1, length + len(piece) + 1))
        length += len(piece)

    for found in pattern.finditer(text):
        keep(text[at : found.start()])
        at = found.end()
        if found.group("special") is None:
            places.append(length)
            continue
        name = names[found.group()]
        parts.append(name)
        length += len(name)
        places.extend([length] * len(found.group()))
    keep(text[at:])
    fast = _fenced(tokenizer, fence)
    encoding = _encoded(fast, "".join(parts), tokenizer)
    return encoding.ids, encoding.offsets, _Said([(places[a], places[b]) for a, b in spans], size)


def _encoded(fast: Any, text: str, tokenizer: Tokenizer) -> Any:
    """The library's encoding. `UserError` for text that the vocabulary cannot spell, and for half
    of a surrogate pair."""
    try:
        return fast.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"tokenizer {tokenizer.name!r}: cannot tokenize this conversation ({first_line(error)})"
        ) from None


@functools.lru_cache(maxsize=8)
def _fenced(tokenizer: Tokenizer, fence: str) -> Any:
    """A copy whose special tokens are numbers between two private characters."""
    order = {token: number for number, token in enumerate(special_tokens(tokenizer))}
    return renamed_tokens(tokenizer, lambda token: f"{fence}{order[token]}{fence}")
