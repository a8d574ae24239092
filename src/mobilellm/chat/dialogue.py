"""A dialogue with a running model: what was said, and the model's next words.

    dialogue = Dialogue(model, ChatTemplate.of(model.tokenizer), system="Be brief.")
    for piece in dialogue.answer("Name a fruit.", 100, Sampling(temperature=0.7)):
        print(piece, end="")
    dialogue.messages        # in OpenAI's form, the answer too
    dialogue.last            # tokens, seconds, why it ended

The model reads what is new in each turn: from the first token on that it does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobilellm.calls.held import CALL, HeldTo, call_schema, read_schema
from mobilellm.calls.parse import Parsed, parse_calls
from mobilellm.errors import UserError
from mobilellm.model.generation import Sampling
from mobilellm.runtimes.remembering import RememberingSession
from mobilellm.runtimes.running import RunningModel, next_token
from mobilellm.tokenizer.chat_template import ChatTemplate, with_call_ids
from mobilellm.tokenizer.conversation import encode_prompt, ends_of_turn
from mobilellm.tokenizer.special_tokens import missing_tokens

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a character whose last bytes are still to come


@dataclass(frozen=True)
class Answer:
    """How an answer went."""

    tokens: int
    seconds: float
    """From the question to the last token, reading included."""
    prompt_tokens: int
    """Of the whole conversation up to the answer."""
    read_tokens: int
    """Of these, the ones that the model had not held."""
    ended: str
    """`turn` at an end-of-turn token, `limit` at the most tokens, `stopped` by the user."""
    closed: int = 0
    """Tokens that closed a value held to a schema, which the limit had cut off."""
    complete: bool = True
    """Whether a value held to a schema is whole."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


class Dialogue:
    """Messages, and the model that answers them."""

    def __init__(
        self,
        model: RunningModel,
        template: ChatTemplate,
        system: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`system` is said before the first turn; `tools`, in OpenAI's form, are what the model may
        call. `UserError` for a template that fails."""
        self.model, self.template, self.system = model, template, system
        self.tools = list(tools) or None
        self.grammar: HeldTo | None = None
        """What every answer is held to."""
        self.messages: list[dict[str, Any]] = []
        self.session = RememberingSession(model.session)
        self.last: Answer | None = None
        self.parsed: Parsed | None = None
        """The last answer's text and calls, where there are tools."""
        self.stop = {*model.session.end_tokens, *ends_of_turn(model.tokenizer, template)}
        self.stop_texts = missing_tokens(model.tokenizer, template.markers())
        """What the template spells and the tokenizer has no token for: it ends a turn as text."""
        self.reset()

    def hold_to(self, schema: Mapping[str, Any] | None, where: str) -> None:
        """Hold every answer to a schema; without one, to a call of one of the tools, written as the
        template has calls. `UserError` for a schema that cannot be held to."""
        tagged = schema is None and CALL in self.template.source
        self.grammar = HeldTo(
            call_schema(self.tools or []) if schema is None else schema,
            self.model.tokenizer,
            vocab_size=self.model.session.vocab_size,
            stop=sorted(self.stop),
            where=where,
            tagged=tagged,
        )

    def reset(self) -> None:
        """Begin anew, with the system's message alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.last = None
        self.session.reset()

    def answer(
        self, text: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, None]:
        """Yield the answer to `text` piece by piece, and note both in `messages`.

        An answer that the caller breaks off is kept as far as it came. `UserError` for an empty
        message, and when the conversation leaves no room for an answer; nothing is noted then.
        """
        if not text.strip():
            raise UserError("an empty message", hint="type something")
        asked = [*self.messages, {"role": "user", "content": text}]
        yield from self._answer(asked, max_new_tokens, sampling)

    def go_on(
        self, results: Sequence[tuple[str, str]], max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, None]:
        """Yield what the model says to results of tools, (name, text) each; else as `answer`."""
        told = [{"role": "tool", "name": name, "content": text} for name, text in results]
        yield from self._answer([*self.messages, *told], max_new_tokens, sampling)

    def _answer(
        self, asked: list[dict[str, Any]], max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, None]:
        session = self.session
        given = with_call_ids(asked)
        prompt = encode_prompt(self.model.tokenizer, self.template, given, self.tools)
        room = session.context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens, the model's context "
                f"{session.context:,}",
                hint="/reset begins a new one",
            )
        generator = torch.Generator().manual_seed(sampling.seed + len(asked))
        decode = self.model.tokenizer.decode
        tokens: list[int] = []
        shown, ended, finished, start = "", "stopped", False, time.perf_counter()
        end: int | None = None
        held = None if self.grammar is None else self.grammar.begin()
        stop_texts = self.stop_texts if held is None else []
        closed, whole = 0, True
        fresh = session.fresh(prompt)
        read = len(fresh)
        try:
            for _ in range(min(max_new_tokens, room)):
                logits = session.feed(fresh)
                before = [*prompt, *tokens]
                token = next_token(logits, sampling, generator, held, before)
                if token in self.stop:
                    finished = True
                    break
                tokens.append(token)
                if held is not None:
                    held.take(token)
                fresh = [token]
                text = decode(tokens, skip_special_tokens=True)
                cut, finished = _before(text, stop_texts)
                if finished:
                    end = cut
                    break
                if not text.endswith(UNFINISHED) and cut > len(shown):
                    piece, shown = text[len(shown) : cut], text[:cut]
                    yield piece
                if held is not None and held.finished:
                    finished = True
                    break
            drawn = len(tokens)
            if held is not None:
                tokens += held.closing()
                closed, whole = len(tokens) - drawn, held.complete
            text = decode(tokens, skip_special_tokens=True)[:end]
            if len(text) > len(shown):
                piece, shown = text[len(shown) :], text
                yield piece
            ended = "turn" if finished else "limit"
        finally:
            if ended == "stopped":  # the session may hold a part of the last tokens
                session.reset()
            self.messages = [*asked, self._said(shown)]
            seconds = time.perf_counter() - start
            self.last = Answer(len(tokens), seconds, len(prompt), read, ended, closed, whole)

    def _said(self, text: str) -> dict[str, Any]:
        """The assistant's message: with the calls in it, where there are tools."""
        self.parsed = parse_calls(text) if self.tools else None
        if self.parsed is None or not self.parsed.calls:
            return {"role": "assistant", "content": text}
        calls = [call.as_openai() for call in self.parsed.calls]
        return {"role": "assistant", "content": self.parsed.text, "tool_calls": calls}


def _before(text: str, ends: Sequence[str]) -> tuple[int, bool]:
    """How much of a text can be shown: up to the first of `ends`, and whether one is there; else
    up to where one could begin."""
    found = [at for end in ends if (at := text.find(end)) >= 0]
    if found:
        return min(found), True
    for length in range(min(len(text), max(map(len, ends), default=0)), 0, -1):
        if any(end.startswith(text[-length:]) for end in ends):
            return len(text) - length, False
    return len(text), False


def dialogue_of(
    model: RunningModel,
    *,
    system: str = "",
    template: Path | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    schema: str = "",
) -> Dialogue:
    """A dialogue by the model's own template, or the one in a file; with tools by ChatML where the
    model's own does not write them. `schema` is a file with the
    schema that answers are held to, or "tool" for a call of one of the tools."""
    if schema == "tool" and not tools:
        raise UserError("--schema tool: there are no tools", hint="give --tools FILE.py:function")
    choose = ChatTemplate.for_tools if tools else ChatTemplate.of
    form = choose(model.tokenizer, template)
    dialogue = Dialogue(model, form, system, tools)
    if schema:
        dialogue.hold_to(None if schema == "tool" else read_schema(Path(schema)), schema)
    return dialogue
