"""The last net: damaged inputs are one line that names file and kind; bugs keep their traceback."""

import contextlib
from pathlib import Path

import pytest

from mobilellm import cli
from mobilellm.cli.verbs import VERBS
from mobilellm.damage import NET, as_user_error, line_of, reading
from mobilellm.errors import UserError
from mobilellm.printable import escaped_json, one_line, printable


def caught(error: BaseException, path: str = "") -> BaseException:
    """The error as it comes out of a reader of `path`."""

    def fail() -> None:
        with reading(path, "a model") if path else contextlib.nullcontext():
            raise error

    with pytest.raises(type(error)) as found:
        fail()
    return found.value


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "path", "line"),
    [
        (KeyError("x"), "m.gguf", f"m.gguf: {NET} a model (KeyError: 'x'); --debug shows where"),
        (PanicException("boom"), "t.json", f"t.json: {NET} a model (PanicException: boom)"),
        (MemoryError(), "m.gguf", "m.gguf: memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "", "memory ran out"),
        (OSError(36, "File name too long", "x" * 9), "", "xxxxxxxxx: file name too long"),
        (OSError(24, "Too many open files", "a"), "b", "a: too many open files"),
        (UserError("bad", hint="mend it"), "m.gguf", "bad; mend it"),
    ],
)
def test_what_an_input_raised_is_one_line(error: BaseException, path: str, line: str) -> None:
    found = line_of(caught(error, path))
    assert found is not None
    assert found.startswith(line)


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError(), AssertionError(), KeyboardInterrupt()]
)
def test_what_no_input_raised_is_a_bug(error: BaseException) -> None:
    assert as_user_error(caught(error)) is None


def test_the_command_line_has_the_net_and_shows_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Verb:
        def __init__(self, path: str) -> None:
            self.path = path

        def run(self) -> int:
            with reading(self.path, "a model") if self.path else contextlib.nullcontext():
                raise KeyError("\x1b[2J\nsecond")

    def run(path: str, *more: str) -> int:
        monkeypatch.setattr(cli, "run", lambda arguments: Verb(path).run())
        with pytest.raises(SystemExit) as ended:
            cli.main(["info", *more])
        return int(ended.value.code or 0)

    assert "info" in VERBS
    assert run("m\x1b.gguf") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mobilellm: m␛.gguf: {NET} a model")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    with pytest.raises(KeyError):
        run("")
    with pytest.raises(KeyError):
        run("m.gguf", "--debug")


def test_text_of_others_is_shown_and_not_obeyed() -> None:
    raw = "a\x1b[2J\x07\x9b\u202e\udcff\tb\nc"
    assert printable(raw) == "a␛[2J␇\\x9b\\u202e\\udcff\tb\nc"
    assert one_line(raw) == "a␛[2J␇\\x9b\\u202e\\udcff b␊c"
    assert len(one_line("x" * 10_000)) <= 2000
    assert one_line("ab" * 2000, 20).endswith("b")
    assert escaped_json('{"a": "\x7f\u202e"}') == '{"a": "\\u007f\\u202e"}'


def test_the_names_of_files_reach_no_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "a\x1b]0;pwned\x07\nsecond.gguf"
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", str(name)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert "\x1b" not in err
