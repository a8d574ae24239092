"""A chat template as the few texts that stand between messages, so that a page needs no Jinja.

    turns = turns_of(tokenizer)
    turns.head + asked + turns.ask       # the prompt of a first message, as texts and token ids

The template is rendered here with marks in the messages' places. Where what stands between them
does not depend on what they say, which a longer conversation proves, the texts between the marks
are all there is to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mobilellm.errors import UserError
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.special_tokens import special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer

Piece = str | int
"""Text, or the id of a special token."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """What stands around the messages of a conversation that begins with the user."""

    head: list[Piece]
    """Before the first message, where there are no instructions."""
    system: tuple[list[Piece], ...] | None
    """Before and after instructions; None for a template that takes none."""
    reply: list[Piece]
    """Between a message and the model's answer to it, of those that are past."""
    next: list[Piece]
    """Between an answer and the next message."""
    ask: list[Piece]
    """After the last message, where the model goes on."""
    trim: bool
    """Whether the template strips white space around what is said."""
    stop: list[str]
    """Text that ends an answer, for a template whose turns end without a special token."""


def turns_of(tokenizer: Tokenizer) -> Turns | None:
    """The turns of the tokenizer's chat template; None where it has none.

    `UserError` for a template that cannot be rendered, or whose texts depend on the messages.
    """
    if tokenizer.chat_template is None:
        return None
    told, asked, answered, asked_again = (f"(({name}))" for name in ("I", "U", "A", "V"))
    three = [("user", asked), ("assistant", answered), ("user", asked_again)]
    whole = _render(tokenizer, three)
    head, reply, after, ask = _between(whole, asked, answered, asked_again)
    system: tuple[str, str] | None = None
    try:
        with_system = _render(tokenizer, [("system", told), *three])
        before, past, *rest = _between(with_system, told, asked, answered, asked_again)
        system = (before, past) if rest == [reply, after, ask] else None
    except UserError:
        system = None
    first = _render(tokenizer, [("user", asked)])
    longer = [*three, ("assistant", "x"), ("user", "y")]
    composed = f"{head}{asked}{reply}{answered}{after}{asked_again}{reply}x{after}y{ask}"
    if first != head + asked + ask or _render(tokenizer, longer) != composed:
        raise UserError("what stands between two messages depends on what they say")
    trim = _render(tokenizer, [("user", f" {asked} ")]) == first
    parts = {name: _pieces(text, tokenizer) for name, text in
             {"head": head, "reply": reply, "next": after, "ask": ask}.items()}  # fmt: skip
    opening = parts["next"][:1]
    around = None if system is None else tuple(_pieces(text, tokenizer) for text in system)
    return Turns(
        **parts,
        system=around,
        trim=trim,
        stop=[text for text in opening if isinstance(text, str) and text.strip()],
    )


def _render(tokenizer: Tokenizer, messages: list[tuple[str, str]]) -> str:
    """The conversation as the template writes it, with the opening of an answer at its end."""
    talk = [{"role": role, "content": content} for role, content in messages]
    try:
        return ChatTemplate.of(tokenizer).render(talk, add_generation_prompt=True).text
    except UserError as error:
        raise UserError(f"the chat template cannot be rendered ({error.what})") from None


def _between(text: str, *marks: str) -> list[str]:
    """The texts before, between and after marks that stand in `text` once and in this order."""
    found: list[str] = []
    for mark in marks:
        before, present, text = text.partition(mark)
        if not present:
            raise UserError("the chat template leaves out a message")
        found.append(before)
    return [*found, text]


def _pieces(text: str, tokenizer: Tokenizer) -> list[Piece]:
    """The text with the special tokens that it spells out as ids."""
    special = special_tokens(tokenizer)
    spellings = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
    parts = re.split(f"({spellings})", text) if spellings else [text]
    return [special.get(part, part) for part in parts if part]
