"""Memory is asked for before it is taken."""

import pytest

from mobilellm import budget, cli
from mobilellm.budget import ask, limit_memory, parsed, room
from mobilellm.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("500M", 500 << 20),
        ("1.5GB", 3 << 29),
        ("1e9", 10**9),
        ("64K", 64 << 10),
        ("2 TiB", 2 << 40),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parsed(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "4 apples", "1e999", "nan"])
def test_other_sizes_are_a_users_error(text: str) -> None:
    with pytest.raises(UserError, match="must be a size"):
        parsed(text)


def test_more_than_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(budget.VARIABLE, raising=False)
    monkeypatch.setattr(budget, "free", lambda: 10 << 30)
    assert room() == 8 << 30  # a share of it
    ask(8 << 30, "x")
    with pytest.raises(UserError, match=r"m.gguf: its weights: 9.0 GiB of memory, where 8.0 GiB"):
        ask(9 << 30, "m.gguf: its weights")


def test_a_limit_counts_what_is_held_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(budget.VARIABLE, "")
    monkeypatch.setattr(budget, "held", lambda: 1 << 30)
    limit_memory("4GiB")
    assert room() == 3 << 30
    monkeypatch.setattr(budget, "held", lambda: 5 << 30)
    assert room() == 0
    ask(budget.ALWAYS, "x")  # nobody needs to ask for little
    with pytest.raises(UserError):
        ask(budget.ALWAYS + 1, "x")


def test_free_memory_is_told_here() -> None:
    assert 0 < budget.free() < 1 << 50
    assert 0 < budget.held() < 1 << 50


def test_any_verb_takes_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(budget.VARIABLE, "")
    assert cli.with_limit(["info", "--max-memory", "2GiB", "125M"]) == ["info", "125M"]
    assert parsed(budget.os.environ[budget.VARIABLE]) == 2 << 30
    assert cli.with_limit(["--max_memory=1g", "info"]) == ["info"]
    assert parsed(budget.os.environ[budget.VARIABLE]) == 1 << 30
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "--max-memory", "much"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
