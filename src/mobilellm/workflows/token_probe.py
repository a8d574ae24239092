"""Whether two tokenizers are one: texts that tell tokenizers apart, and where the ids differ.

    compare_tokens(before, after)        # [TokenDifference(what="'  two'", ...)]; empty when equal

A format that stores a tokenizer in terms of its own can lose a rule without a sign of it: logits
of given ids stay equal, and the text that a user types becomes other ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from mobilellm.errors import UserError
from mobilellm.tokenizer.tokenizer import Tokenizer

# Each line is there for a rule that some format or reader has lost.
TEXTS = (
    "Hello world",
    " leading space",
    "  two leading, two  between, two trailing  ",
    "                and a whole run of them",
    "\n\nlines\r\nof\n \n two kinds\n",
    "\ttabs\t\tbetween\t words",
    "1 22 333 4444 55555 3.14159 1,000,000 2024-11-25 ½ ²",
    "It's we'll I'm they've DON'T o'clock 'quoted' \"so\"",
    "snake_case camelCase x=y+z; f(a[0])->b != c && d // e",
    "https://example.org/a?b=c&d=%20e#f",
    "naïve café über Straße Ångström ﬁ Ⅷ",
    "Привет, мир! Γειά σου Κόσμε",
    "日本語のテキスト。中文，你好！한국어 문장",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "e\u0301 combining, \u00a0 no-break, \u200b zero width, \u3000 ideographic, \ufeff mark",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ✌🏽 \U0001f9ff",
    "\x00 \x01 \x07 \x1b \x7f \x85",
    "a\u2581b \u2581\u2581 c",
    "\u0120GPT \u010a Ġ Ċ",
    "<0x41> <unk> <s> </s> <pad> [INST] <|endoftext|> <|im_start|>user",
    "ab" * 40,
    "",
)
MAX_SPELLED = 64  # special tokens that are tried spelled out


@dataclass(frozen=True, kw_only=True)
class TokenDifference:
    """One thing in which two tokenizers differ."""

    what: str
    """The text that was encoded, as Python spells it, or the setting that was compared."""
    before: object
    """Ids, text or id by the one."""
    after: object
    """By the other."""
    is_setting: bool = False
    """Whether it is a setting, or the ids of a text."""

    def __str__(self) -> str:
        return f"{self.what}: {_short(self.before)} became {_short(self.after)}"


def compare_tokens(before: Tokenizer, after: Tokenizer) -> list[TokenDifference]:
    """Where the second tokenizer gives other ids, or other text of the same ids; empty when none.

    The ids that delimit documents are compared too, and whether BOS is put before a text.
    """
    found = [
        TokenDifference(
            what=name, before=getattr(before, name), after=getattr(after, name), is_setting=True
        )
        for name in ("vocab_size", "bos_id", "eos_id", "add_bos")
        if getattr(before, name) != getattr(after, name)
    ]
    for text in probes(before):
        ids, theirs = _ids(before, text), _ids(after, text)
        if ids == theirs:  # and where special tokens that are spelled out are those tokens
            ids, theirs = _ids(before, text, True), _ids(after, text, True)
        if ids != theirs:
            found.append(TokenDifference(what=repr(text), before=ids, after=theirs))
        elif isinstance(ids, list) and before.decode(ids) != after.decode(ids):
            found.append(
                TokenDifference(
                    what=f"the text of {_short(ids)}",
                    before=before.decode(ids),
                    after=after.decode(ids),
                )
            )
    return found


def compare_ids(
    before: Tokenizer, after: Callable[[str, bool], list[int]]
) -> list[TokenDifference]:
    """Where a function from text to ids gives others than the tokenizer.

    Its second argument is whether a special token that the text spells out is that token; both
    ways are compared.
    """
    found = []
    for text in probes(before):
        for parse in (False, True):
            ids = _ids(before, text, parse)
            if isinstance(ids, list) and ids != (theirs := after(text, parse)):
                found.append(TokenDifference(what=repr(text), before=ids, after=theirs))
                break
    return found


def probes(tokenizer: Tokenizer) -> list[str]:
    """The texts, and the tokenizer's own added tokens spelled out within a text."""
    added = [token["content"] for token in json.loads(tokenizer.fast.to_str())["added_tokens"]]
    spelled = [f"a {token}b{token} c" for token in added[:MAX_SPELLED]]
    return [*TEXTS, *spelled]


def _ids(tokenizer: Tokenizer, text: str, parse: bool = False) -> list[int] | str:
    """Ids, or what the tokenizer says when it has none for a text."""
    try:
        return tokenizer.encode(text, parse_special=parse)
    except UserError:
        return "no ids"


def _short(value: object) -> str:
    text = str(value) if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
