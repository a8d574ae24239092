"""The loop of `mobilellm chat`: read a message, show the answer as it comes, obey commands.

ChatLoop(dialogue, max_new_tokens=512, sampling=Sampling(temperature=0.7)).run(line_reader("> "))
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from mobilellm.calls.functions import Tool
from mobilellm.calls.parse import Call
from mobilellm.chat.dialogue import Dialogue
from mobilellm.errors import UserError, unknown_name
from mobilellm.files import write_file
from mobilellm.model.generation import Sampling
from mobilellm.printable import one_line, printable

COMMANDS = {
    "/reset": "begin a new conversation",
    "/save FILE": "write the conversation as a line of JSON that prepare --chat reads",
    "/help": "this list",
    "/exit": "leave; so does Ctrl-D",
}
MAX_ROUNDS = 8  # answers to a message, as long as each calls a function
MAX_SHOWN = 300  # characters of a result that are shown
NAMES = tuple(command.split()[0] for command in COMMANDS)


@dataclass
class ChatLoop:
    """A conversation with whoever types."""

    dialogue: Dialogue
    max_new_tokens: int
    sampling: Sampling
    interactive: bool = False
    """Whether a person reads along: errors of a message are shown and the talk goes on."""
    silent: bool = False
    """Print nothing; what was said is in the dialogue."""
    tools: Mapping[str, Tool] = field(default_factory=dict)
    """What the model may call, by name."""
    run_tools: bool = False
    """Run what is called without asking."""
    confirm: Callable[[], bool] | None = None
    """Asks the user whether what was shown is to be run; None where nobody can be asked."""

    def run(self, read: Callable[[], str]) -> list[dict[str, Any]]:
        """Until the input ends or /exit; returns the figures of each answer.

        `UserError` of a message ends it where nobody reads along.
        """
        figures: list[dict[str, Any]] = []
        while True:
            try:
                text = read()
            except EOFError:
                break
            except KeyboardInterrupt:  # clears the line, as in a shell
                if not self.interactive:
                    raise
                continue
            try:
                if not text.strip():
                    continue
                if text.startswith("/"):
                    if not self.command(text.strip()):
                        break
                    continue
                self.turn(text, figures)
            except UserError as error:
                if not self.interactive:
                    raise
                self.note(str(error))
        return figures

    def turn(self, text: str, figures: list[dict[str, Any]]) -> None:
        """Show the answer to a message as it comes, and what follows from the calls in it."""
        answer = self.dialogue.answer(text, self.max_new_tokens, self.sampling)
        for _ in range(MAX_ROUNDS):
            whole = self.say(answer)
            if self.dialogue.last is not None:
                figures.append(self._figures())
            results = self.results() if whole else []
            if not results:
                return
            answer = self.dialogue.go_on(results, self.max_new_tokens, self.sampling)
        self.note(f"{MAX_ROUNDS} answers with calls in a row: the talk goes on with you")

    def say(self, answer: Generator[str, None, None]) -> bool:
        """Show an answer as it comes, and its speed; whether it came to its end."""
        try:
            with contextlib.closing(answer) as pieces:
                for piece in pieces:
                    self.show(printable(piece))
            self.show("\n")
        except KeyboardInterrupt:
            self.show("\n")
            if not self.interactive:
                raise
        last = self.dialogue.last
        if last is None:
            return False
        if self.interactive:
            why = {"turn": "", "limit": "; the limit", "stopped": "; stopped"}[last.ended]
            self.note(f"{last.tokens:,} tokens, {last.tokens_per_second:,.1f} a second{why}")
        if last.closed:
            self.note(f"at the limit of tokens {last.closed} more closed the value")
        elif not last.complete:
            self.note("at the limit of tokens the value is not complete")
        return last.ended != "stopped"

    def results(self) -> list[tuple[str, str]]:
        """Results of the calls in the last answer, by name; none unless the user lets them run."""
        parsed = self.dialogue.parsed
        if parsed is None:
            return []
        if parsed.fault:
            self.note(f"a call that does not parse: {parsed.fault}")
        for call in parsed.calls:
            self.note(f"call: {one_line(str(call))}")
        if not parsed.calls:
            return []
        if not self.run_tools and (self.confirm is None or not self.confirm()):
            self.note("not run" if self.confirm else "not run; --run-tools runs calls")
            return []
        try:
            return [(call.name, self.result(call)) for call in parsed.calls]
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.note("stopped")
            return []

    def result(self, call: Call) -> str:
        """Run a call and show what it gives."""
        tool = self.tools.get(call.name)
        known = ", ".join(self.tools)
        text = tool.run(call.arguments) if tool else f"error: no such function; known: {known}"
        cut = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
        self.note(f"result: {one_line(cut)}")
        return text

    def command(self, text: str) -> bool:
        """Obey a command; whether the talk goes on. `UserError` for an unknown one."""
        name, _, rest = text.partition(" ")
        if name not in NAMES:
            raise unknown_name("command", printable(name), NAMES)
        if name == "/exit":
            return False
        if name == "/reset":
            self.dialogue.reset()
            self.note("a new conversation")
        elif name == "/save":
            self.save(rest.strip())
        else:
            width = max(map(len, COMMANDS))
            for command, what in COMMANDS.items():
                self.note(f"{command:<{width}}  {what}")
            self.note("Enter sends; Alt-Enter, or a backslash at a line's end, begins a new line")
        return True

    def save(self, name: str) -> None:
        """Write the conversation to a new file of this name."""
        if not name:
            raise UserError("/save needs a file name", hint="/save talk.jsonl")
        path = Path(name).expanduser()
        if path.exists():
            raise UserError(f"{path}: exists already", hint="choose another name")
        if not any(message["role"] == "assistant" for message in self.dialogue.messages):
            raise UserError("nothing was said yet", hint="save after an answer")
        talk: dict[str, Any] = {"messages": self.dialogue.messages}
        talk |= {"tools": self.dialogue.tools} if self.dialogue.tools else {}
        write_file(path, orjson.dumps(talk, option=orjson.OPT_APPEND_NEWLINE))
        self.note(f"{len(self.dialogue.messages)} messages in {path}")

    def show(self, text: str) -> None:
        """A piece of the answer, on standard output."""
        if not self.silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, line: str) -> None:
        """A line about the talk, on standard error."""
        if not self.silent:
            dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
            print(f"{dim}{printable(line)}{plain}", file=sys.stderr, flush=True)

    def _figures(self) -> dict[str, Any]:
        last = self.dialogue.last
        assert last is not None
        return {**vars(last), "tokens_per_second": round(last.tokens_per_second, 1)}
