"""Text of a model, a tool or a file, safe for a terminal.

    printable("\\x1b[2J")        # "␛[2J": shown, not obeyed

Escape sequences could clear the screen, set its title, or write what was never said. Characters
that control the terminal or turn the direction of writing become visible ones.
"""

from __future__ import annotations

import re

# C0 but tab and line feed, DEL, C1, line separators, marks and overrides of direction, surrogates.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
PICTURES = 0x2400  # where Unicode has pictures of C0


def printable(text: str) -> str:
    """The text with every controlling character replaced by one or more that show it."""
    return CONTROL.sub(lambda found: _shown(ord(found.group())), text)


def _shown(code: int) -> str:
    if code < 0x20:
        return chr(PICTURES + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
