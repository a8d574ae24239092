"""Locks, and the folder for what can be made again."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mobilellm.errors import UserError
from mobilellm.files import cache_folder, locked

HOLD = """
import sys
from pathlib import Path
from mobilellm.files import locked
with locked(Path(sys.argv[1]), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(lock: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_that_another_process_holds_is_refused_and_names_it(tmp_path: Path) -> None:
    lock = tmp_path / "run/.lock"
    with holder(lock) as other:
        expected = rf"run: another process \(process {other.pid}\) is at work here; wait for it"
        with (
            pytest.raises(UserError, match=expected),
            locked(lock, tmp_path / "run", "is at work here", hint="wait for it"),
        ):
            pytest.fail("two processes held one lock")
        other.communicate("")
    with locked(lock, tmp_path / "run", "is at work here"):
        assert lock.read_text() == f"process {os.getpid()}\n"


def test_without_a_reason_to_refuse_a_process_waits(tmp_path: Path) -> None:
    lock, seen = tmp_path / "lock", []

    def wait() -> None:
        with locked(lock, tmp_path):
            seen.append(lock.read_text())

    with holder(lock) as other:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        assert seen == []
        other.communicate("")
        thread.join(timeout=20)
    assert seen == [f"process {os.getpid()}\n"]


def test_whoever_waited_for_a_lock_that_was_removed_takes_a_new_one(tmp_path: Path) -> None:
    folder, seen = tmp_path / "work", []

    def wait() -> None:
        with locked(folder / "lock", folder):
            seen.append((folder / "lock").read_text())

    with holder(folder / "lock") as other:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        shutil.rmtree(folder)
        other.communicate("")
        thread.join(timeout=20)
    assert seen == [f"process {os.getpid()}\n"]


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "lock", tmp_path, "is busy"):
        raise RuntimeError
    with locked(tmp_path / "lock", tmp_path, "is busy"):
        pass


def test_the_cache_lies_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/kept")
    assert cache_folder() == tmp_path / "kept/mobilellm"
    for unset in (
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", ""),
        lambda: monkeypatch.delenv("XDG_CACHE_HOME"),
    ):
        unset()
        assert cache_folder() == tmp_path / ".cache/mobilellm"


def test_a_name_that_is_no_utf8_is_a_users_error() -> None:
    from mobilellm.files import check_utf8

    check_utf8(Path("größe.txt"))
    with pytest.raises(UserError, match="its name is no UTF-8; rename it"):
        check_utf8(Path("a\udcff.txt"))
