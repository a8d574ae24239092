"""How long the patterns of a tokenizer that somebody else wrote may search.

    ids = within_time(lambda: fast.encode(text).ids, len(text), "tokenizer.json")

A pattern such as `(a+)+$` takes twice as long for each further letter, and nothing interrupts the
library. So what may be of that kind runs in a thread of its own, which is given up in time.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mobilellm.damage import is_failure
from mobilellm.errors import UserError, first_line

MAX_SPACES = 1 << 22
"""Spaces in a row: the library's patterns give up (it panics) after ten million steps back."""
SPACES = re.compile(rf"\s{{{MAX_SPACES + 1}}}")
LONG = 1 << 16
"""Characters from which on any tokenizer's time is bounded."""
SECONDS, CHARACTERS_A_SECOND = 15.0, 50_000
"""Processor time that a text may take; real tokenizers do a million characters a second."""

Result = TypeVar("Result")


def is_risky(content: dict[str, Any]) -> bool:
    """Whether a pattern in a tokenizer.json repeats without end what repeats without end itself:
    the time of a search may double with each character."""
    return any(
        _repeats_repetition(pattern)
        for part in ("normalizer", "pre_tokenizer")
        for pattern in _patterns(content.get(part))
    )


def _patterns(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for inner in value.values():
            yield from _patterns(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _patterns(inner)


TOKEN = re.compile(
    r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|\[[^\]]*\]|[^\]\\])*\]|\((?:\?[^:)]*:|\?[=!>]|\?<[=!])?|\)"
    r"|(?:[*+]|\{\d*,\})[?+]?|.",
    re.DOTALL,
)
"""An escape, a class, the opening of a group, its end, a repetition without end, or a character."""


def _repeats_repetition(pattern: str) -> bool:
    repeated, last = [False], False  # whether the open groups, and the last part, repeat
    for token in TOKEN.findall(pattern):
        if token.startswith("("):
            repeated.append(False)
            last = False
        elif token == ")" and len(repeated) > 1:
            last = repeated.pop()
            repeated[-1] |= last
        elif token[0] in "*+" or (token[0] == "{" and token.rstrip("?+").endswith(",}")):
            if last and not (len(token) > 1 and token.endswith("+")):
                return True
            repeated[-1], last = True, True
        else:
            last = False
    return False


def check_spaces(texts: list[str], name: str) -> None:
    """`UserError` for a text with more than `MAX_SPACES` spaces in a row."""
    for text in texts:
        if len(text) > MAX_SPACES and SPACES.search(text):
            raise UserError(
                f"tokenizer {name!r}: a text with more than {MAX_SPACES:,} spaces in a row",
                hint="is it text? If so, leave the spaces out",
            )


def within_time(
    call: Callable[[], Result], characters: int, name: str, *, quiet: bool = False
) -> Result:
    """What `call` gives. `UserError` that names the tokenizer when it takes longer than a text of
    so many characters may, or when the library panics; then its thread is left behind.

    With `quiet` nothing that the library writes to standard error meanwhile is shown.
    """
    allowed = SECONDS + characters / CHARACTERS_A_SECOND
    found: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    start, waited = time.process_time(), 0.001
    with _silence() if quiet else contextlib.nullcontext():
        thread.start()
        while thread.is_alive():
            thread.join(waited)
            waited = min(0.2, waited * 2)
            if thread.is_alive() and time.process_time() - start > allowed:
                raise UserError(
                    f"tokenizer {name!r}: more than {allowed:.0f} seconds for {characters:,} "
                    "characters, and given up",
                    hint="does a pattern of its pre-tokenizer repeat a repetition?",
                )
    if failed:
        raise failed[0]
    return found[0]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """A panic of the library writes a page to standard error, whoever catches it."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def library_error(error: BaseException, name: str) -> UserError:
    """The line for what the library raised: a bare Exception, or a panic, which is none. Anything
    else is raised again."""
    if isinstance(error, UserError) or not is_failure(error):
        raise error
    return UserError(f"tokenizer {name!r}: cannot tokenize this text ({first_line(error)})")
