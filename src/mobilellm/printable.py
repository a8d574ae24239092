"""Text of others, safe for a terminal: of a model, a tool, a file, its name, its keys.

    printable("\\x1b[2J")                # "␛[2J": shown, not obeyed
    one_line("a\\nb")                    # "a␊b"

Escape sequences could clear the screen, set its title, or write what was never said. Characters
that control the terminal or turn the direction of writing become visible ones. What verbs print
goes through here: `mobilellm.terminal.output` has `put` and `say`, and an error is one line of it.
"""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL, C1, line separators, marks and overrides of direction, surrogates.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
PICTURES = 0x2400  # where Unicode has pictures of C0
MAX_LINE = 2000
"""Characters of one line; of a longer one the middle is left out."""


def printable(text: str) -> str:
    """The text with every controlling character replaced by one or more that show it."""
    return CONTROL.sub(lambda found: _shown(ord(found.group())), text)


def one_line(text: str, most: int = MAX_LINE) -> str:
    """The text as one line of at most `most` characters: line feeds are shown, too, and tabs are
    spaces."""
    if len(text) > most:
        half = most // 2
        text = f"{text[: half - 2]} … {text[-(most - half - 1) :]}"
    return printable(text).replace("\t", " ").replace("\n", chr(PICTURES + 10))


def escaped_json(text: str) -> str:
    """JSON text in which characters that control a terminal are escapes; its value is the same.

    JSON itself escapes C0 alone.
    """
    return CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(PICTURES + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
