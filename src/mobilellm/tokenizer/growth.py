"""How much longer a tokenizer's file may make a text before it is cut.

    check_growth(content, "tokenizer.json")    # UserError for 40 rules that each double a letter

A normalizer is a list of rules of whoever made the file. Each may lengthen the text, and the next
one lengthens what came out, so that a few lines ask for more memory than there is. A rule whose
pattern matches nothing at all, between any two letters, makes the library panic.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from mobilellm.errors import UserError

MAX_GROWTH = 64
"""Times as long as it was that a text may become; rules in use do not double it."""
MAX_PUT_BEFORE = 4096  # characters that one rule may put before a text
MAX_RULES = 1000


def check_growth(content: dict[str, Any], where: str) -> None:
    """`UserError` for a tokenizer, as the library's JSON, whose normalizer or decoder could
    lengthen a text beyond MAX_GROWTH, or whose patterns match nothing."""
    for part in ("normalizer", "decoder"):
        growth = 1.0
        rules = _rules(content.get(part))
        if len(rules) > MAX_RULES:
            raise UserError(f"{where}: {len(rules)} rules in its {part}")
        for rule in rules:
            growth *= _growth(rule, where)
        if growth > MAX_GROWTH:
            raise UserError(
                f"{where}: its {part} could make a text {growth:.3g} times as long, the limit is "
                f"{MAX_GROWTH}",
                hint="give another tokenizer",
            )


def _rules(part: Any) -> list[dict[str, Any]]:
    """The rules of a normalizer or decoder, those within sequences too, in their order."""
    if not isinstance(part, dict):
        return []
    inner = part.get("normalizers") or part.get("decoders")
    if isinstance(inner, list):
        return [rule for one in inner for rule in _rules(one)]
    return [part]


def _growth(rule: dict[str, Any], where: str) -> float:
    """How many times as long a text can become by one rule."""
    kind = rule.get("type")
    if kind == "ByteLevel":
        return 2.0  # a character for each byte
    if kind == "Prepend" and len(str(rule.get("prepend"))) > MAX_PUT_BEFORE:
        raise UserError(f"{where}: puts {len(str(rule['prepend']))} characters before a text")
    if kind != "Replace":
        return 1.0
    pattern, put = rule.get("pattern"), len(str(rule.get("content")).encode())
    named = pattern if isinstance(pattern, dict) else {}
    shortest = len(str(named.get("String", "")).encode())
    if "Regex" in named:
        shortest = _shortest_match(str(named["Regex"]))
    if not shortest:
        raise UserError(f"{where}: replaces a pattern that matches nothing", hint="use another one")
    return max(1.0, put / shortest)


def _shortest_match(pattern: str) -> int:
    """Characters of the shortest text that a pattern matches; 1 for one that Python cannot read."""
    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\[hHRX]", "x", pattern)
    try:
        return int(parser.parse(plain).getwidth()[0])
    except (re.error, RecursionError, OverflowError):
        return 1
