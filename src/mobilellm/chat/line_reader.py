"""Reads what a user types: a line editor in a terminal, plain lines from a pipe.

    read = line_reader("> ")
    text = read()              # EOFError at the end, KeyboardInterrupt at Ctrl-C

In a terminal prompt_toolkit edits: Enter sends, Alt-Enter begins a further line, the
arrows bring back what was typed before. Without it, and from a pipe, a message is a line, and a
backslash at a line's end goes on with the next.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

MAX_MESSAGE = 1 << 20  # characters


def has_editor() -> bool:
    """Whether prompt_toolkit is installed."""
    return importlib.util.find_spec("prompt_toolkit") is not None


def line_reader(prompt: str, commands: tuple[str, ...] = ()) -> Callable[[], str]:
    """A function that returns the next message."""
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        return lambda: plain_message("")
    return _editor(prompt, commands) if has_editor() else lambda: plain_message(prompt)


def asked(question: str) -> bool:
    """Whether who types says yes; the end of the input and Ctrl-C are no."""
    try:
        return line_reader(question)().strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def plain_message(prompt: str) -> str:
    """A message of one line, or of several that end in a backslash but for the last."""
    lines: list[str] = []
    while True:
        if prompt:
            sys.stdout.write(prompt)
            sys.stdout.flush()
        line = sys.stdin.readline(MAX_MESSAGE)
        if not line and not lines:
            raise EOFError
        text = line.removesuffix("\n").removesuffix("\r")
        if not line.endswith("\n") or not text.endswith("\\"):
            return "\n".join([*lines, *([text] if line else [])])
        lines.append(text[:-1])


def _editor(prompt: str, commands: tuple[str, ...]) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys: Any = KeyBindings()

    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    for enter in ("enter", "c-j"):  # what was typed before the editor was up has line feeds
        keys.add(enter)(send)
        keys.add("escape", enter)(new_line)

    session: Any = PromptSession(
        history=InMemoryHistory(),
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter(list(commands), sentence=True),
        complete_while_typing=False,
        prompt_continuation=lambda width, number, wrapped: " " * width,
    )
    return lambda: str(session.prompt(prompt))
