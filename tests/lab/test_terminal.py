"""What a lab asks a person before it begins, at a terminal of its own."""

from __future__ import annotations

import os
import pty
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.command_line import status_of

from mobilellm.lab.folder import LabFolder
from mobilellm.lab.work import Worked

QUESTION = b"Begin? [Y/n] "

pytestmark = pytest.mark.usefixtures("steady")


class Person:
    """Sits at the other end of a terminal, reads up to the question and answers once."""

    def __init__(self, terminal: int, answer: bytes) -> None:
        self.terminal, self.answer, self.screen = terminal, answer, b""
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        try:
            while piece := os.read(self.terminal, 65536):
                before, self.screen = self.screen, self.screen + piece
                if QUESTION not in before and QUESTION in self.screen:
                    os.write(self.terminal, self.answer)
        except OSError:  # Linux's way of saying that the other end is closed
            pass


@pytest.fixture
def lab_at_a_terminal(
    lab_file: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bytes], tuple[int, str]]:
    """Begin a lab and answer its question; the exit status, and what the screen showed."""

    def begin(answer: bytes) -> tuple[int, str]:
        outer, inner = pty.openpty()
        person = Person(outer, answer)
        with (
            open(os.dup(inner)) as stdin,
            open(inner, "w") as stderr,
            monkeypatch.context() as patched,
        ):
            patched.setattr(sys, "stdin", stdin)
            patched.setattr(sys, "stderr", stderr)
            arguments = ("--data", small_data, "--seeds", 1, "--set", "train.steps=2")
            status = status_of("lab", lab_file, "--out", tmp_path / "lab", *arguments)
        person.thread.join(10)
        os.close(outer)
        return status, person.screen.decode()

    return begin


@pytest.mark.parametrize("answer", [b"n\n", b"what?\n", b"\x04"])
def test_nothing_begins_without_a_yes(
    lab_at_a_terminal: Callable[[bytes], tuple[int, str]], tmp_path: Path, answer: bytes
) -> None:
    """Ctrl-D neither."""
    status, screen = lab_at_a_terminal(answer)
    assert status == 0
    assert screen.rstrip().endswith("nothing was begun")
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("answer", [b"\n", b"Yes\n"])
def test_a_yes_begins(
    lab_at_a_terminal: Callable[[bytes], tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: bytes,
) -> None:
    monkeypatch.setattr("mobilellm.terminal.lab_session.work", lambda *_: Worked())
    lab_at_a_terminal(answer)
    assert len(LabFolder.open(tmp_path / "lab").left()) == 3


def test_the_terminal_then_shows_how_far_it_is(
    lab_at_a_terminal: Callable[[bytes], tuple[int, str]],
) -> None:
    status, screen = lab_at_a_terminal(b"y\n")
    assert status == 0
    for words in ("1/3  3, seed 0", "2/3  2, seed 0", "3/3  6, seed 0", "\x1b["):
        assert words in screen
