"""The command line as tests call it: in this process, which has torch loaded already."""

from __future__ import annotations

import pytest

from mobilellm import cli


def status_of(*arguments: object) -> int:
    """The exit status of a verb."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(one) for one in arguments])
    return int(ended.value.code or 0)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """A verb's exit status, what it printed, and what it said on the error stream."""
    status = status_of(*arguments)
    return status, *capsys.readouterr()


def call(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> tuple[str, str]:
    """What a verb printed, and what it said on the error stream, where it ends as it should."""
    found, out, err = outcome(capsys, *arguments)
    assert found == status, err
    return out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line in which a verb says what a user got wrong."""
    out, err = call(capsys, *arguments, status=2)
    assert out == ""
    (line,) = err.splitlines()
    return line
