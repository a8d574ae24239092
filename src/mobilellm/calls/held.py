"""Output held to a JSON schema: at each step only tokens that can still become a valid value.

    grammar = HeldTo({"type": "integer"}, tokenizer, vocab_size=49152, stop=[0])
    held = grammar.begin()
    logits = held.masked(logits)      # -inf wherever the schema allows nothing
    held.take(token)                  # the one that was drawn
    held.complete                     # whether the text so far is a whole value
    held.closing()                    # tokens that end it, where the model was cut off

The grammar is llguidance's (Microsoft's, MIT), which takes JSON Schema without `not` and a few rare
keys and says so of what it does not take. Values are written with one space after a comma or colon,
as `json.dumps` and chat templates have them, so that no model can fill its limit with blanks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mobilellm.errors import UserError, first_line
from mobilellm.files import read_json
from mobilellm.tokenizer.special_tokens import special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer

MAX_SCHEMA = 1 << 20  # bytes of a schema
MAX_CLOSING = 512  # tokens that a value that was cut off may still take
SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
CALL = "<tool_call>"  # how ChatML's templates, ours among them, have calls written
# What ends a value soonest, outside of strings; a quote within them.
CLOSERS = ("}", "]", '"', ",", "null", "0", "true")
ONLY_IN_STRINGS = "#"


def read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema in a file. `UserError` for what is none."""
    schema = read_json(path, limit=MAX_SCHEMA)
    if not isinstance(schema, dict):
        raise UserError(f"{path}: a JSON schema is an object, not {type(schema).__name__}")
    return schema


def held_to_file(path: Path, tokenizer: Tokenizer, vocab_size: int, stop: Sequence[int]) -> HeldTo:
    """The schema in a file, made ready. `UserError` as `read_schema` and `HeldTo` raise."""
    schema = read_schema(path)
    return HeldTo(schema, tokenizer, vocab_size=vocab_size, stop=stop, where=str(path))


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of a call of any of these tools, which are in OpenAI's form."""
    return {"anyOf": [_one_call(tool["function"]) for tool in tools]}


def _one_call(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if "properties" in parameters:  # a function takes no other arguments, said or not
        parameters = {"additionalProperties": False, **parameters}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": parameters,
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


@functools.lru_cache(maxsize=2)
def _token_trie(tokenizer: Tokenizer, rows: int, end: tuple[int, ...]) -> Any:
    """The library's view of a tokenizer, which takes half a second for 49,152 tokens. `UserError`
    for one that it cannot take."""
    import llguidance

    try:
        return llguidance.LLTokenizer(
            tokenizer.fast.to_str(), n_vocab=rows, eos_token=list(end) or None
        )
    except Exception as error:  # the library raises bare ValueErrors
        raise UserError(
            f"tokenizer {tokenizer.name!r}: no schema can be held to with it ({first_line(error)})"
        ) from None


class HeldTo:
    """A schema made ready for a tokenizer and a model's vocabulary."""

    def __init__(
        self,
        schema: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        stop: Sequence[int],
        where: str = "schema",
        tagged: bool = False,
    ) -> None:
        """`vocab_size` is that of the logits, `stop` the tokens at which the text ends: allowed
        where the value is whole, and nowhere else. With `tagged` the value stands in the tags
        `<tool_call>`. `UserError` that names `where` for a schema that cannot be held to.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise UserError(
                "llguidance is not installed (8 MB)", hint="pip install 'mobilellm[chat]'"
            )
        import llguidance

        self.vocab_size, self.where = vocab_size, where
        self.stop = np.array(sorted({i for i in stop if 0 <= i < vocab_size}), np.int64)
        end = [int(i) for i in self.stop] or list(special_tokens(tokenizer).values())[:1]
        rows = max(vocab_size, tokenizer.vocab_size)
        spelled = {**schema, "x-guidance": SPELLING}
        self.tokens = _token_trie(tokenizer, rows, tuple(end))
        if tagged:
            rule = f'start: "{CALL}\\n" call "\\n</{CALL[1:]}"\ncall: %json '
            grammar = llguidance.LLMatcher.grammar_from_lark(rule + orjson.dumps(spelled).decode())
        else:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(orjson.dumps(spelled).decode())
        self.matcher = llguidance.LLMatcher(self.tokens, grammar, log_level=0)
        if self.matcher.is_error():
            said = first_line(UserError(self.matcher.get_error()))
            raise UserError(
                f"{where}: no output can be held to it ({said})",
                hint="leave out what it does not know",
            )
        self.closers = [found for text in CLOSERS if (found := self._token(text)) is not None]
        self.quote, self.mark = self._token('"'), self._token(ONLY_IN_STRINGS)

    def _token(self, text: str) -> int | None:
        """The token of exactly this text, or None."""
        ids = self.tokens.greedy_tokenize(text)
        return ids[0] if len(ids) == 1 else None

    def begin(self) -> Held:
        """For one text."""
        return Held(self, self.matcher.deep_copy())


class Held:
    """One text that is held to a schema, as far as it has come."""

    def __init__(self, grammar: HeldTo, matcher: Any) -> None:
        self.grammar, self.matcher = grammar, matcher

    @property
    def complete(self) -> bool:
        """Whether what was taken is a whole value."""
        return bool(self.matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """Whether nothing can follow; where no token ends a text, whether the value is whole."""
        return bool(self.matcher.is_stopped()) or (not len(self.grammar.stop) and self.complete)

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """The logits (V,), -inf for every token that cannot follow."""
        return np.where(self._allowed(self.matcher), logits, -np.inf).astype(np.float32)

    def _allowed(self, matcher: Any) -> np.ndarray:
        """Which tokens can follow, (V,) of bool. `UserError` when there are none."""
        packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: self.grammar.vocab_size].astype(bool)
        allowed[self.grammar.stop] = matcher.is_accepting()
        if matcher.is_error() or not allowed.any():
            said = matcher.get_error() or "no token of the vocabulary can follow"
            raise UserError(f"{self.grammar.where}: {first_line(UserError(said))}")
        return allowed

    def take(self, token: int) -> None:
        """Note a token. `UserError` for one that cannot follow."""
        if not self.matcher.consume_token(token):
            raise UserError(
                f"{self.grammar.where}: {first_line(UserError(self.matcher.get_error()))}"
            )

    def closing(self) -> list[int]:
        """Tokens that make the value whole, as few as are easily found; they are taken, too.

        Nothing is taken, and the list is empty, when the value is whole already or would take more
        than `MAX_CLOSING`: see `complete`.
        """
        grammar, matcher = self.grammar, self.matcher.deep_copy()
        found: list[int] = []
        while not matcher.is_accepting():
            forced = matcher.compute_ff_tokens()
            if not forced:
                allowed = self._allowed(matcher)
                in_string = grammar.mark is not None and allowed[grammar.mark]
                first = [grammar.quote] if in_string and grammar.quote is not None else []
                order = [*first, *([] if in_string else grammar.closers)]
                fitting = [token for token in order if allowed[token]]
                forced = fitting[:1] or [self._shortest(allowed)]
            found += forced
            if len(found) > MAX_CLOSING or not matcher.consume_tokens(forced):
                return []
        self.matcher = matcher
        return found

    def _shortest(self, allowed: np.ndarray) -> int:
        """The allowed token of the fewest bytes."""
        tokens = self.grammar.tokens
        return min(
            (int(i) for i in allowed.nonzero()[0]), key=lambda i: len(tokens.decode_bytes([i]))
        )
