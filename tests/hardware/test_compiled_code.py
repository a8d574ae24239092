"""Compiled code is kept in the user's cache, under a name that says what it depends on, and what is
found there is what would have been compiled."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch._inductor.codecache as codecache

from mobilellm.hardware import compiled_code
from mobilellm.hardware.compiled_code import VARIABLE, keep_compiled_code
from mobilellm.hardware.probes import compiler_works


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache, with no choice of folder made yet."""
    monkeypatch.setenv(VARIABLE, "restored after the test")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        monkeypatch.setattr(codecache, name, getattr(codecache, name))
    compiled_code._key.cache_clear()
    yield tmp_path / "mobilellm/compiled"
    compiled_code._key.cache_clear()


def test_it_is_the_users_alone(kept: Path) -> None:
    keep_compiled_code()
    folder = Path(os.environ[VARIABLE])
    assert folder.parent == kept
    assert set(kept.iterdir()) == {folder, kept / "headers"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {0o700}
    assert str(kept / "headers") == codecache._HEADER_DIR
    assert str(kept / "headers/locks") == codecache._HEADER_LOCK_DIR


def test_a_choice_of_the_users_own_stays(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "elsewhere")
    keep_compiled_code()
    assert os.environ[VARIABLE] == "elsewhere"
    assert not kept.exists()


def test_where_nothing_can_be_written_torch_chooses(kept: Path) -> None:
    kept.parent.write_text("a file where the folder would be")
    keep_compiled_code()
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("changed", ["source", "processor", "torch", "nothing"])
def test_what_it_depends_on_is_in_its_name(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    package = tmp_path / "package"
    for room in (*compiled_code.TRACED, "hardware"):
        (package / room).mkdir(parents=True)
    source = package / compiled_code.TRACED[-1] / "a.py"
    source.write_text("x = 1")
    monkeypatch.setattr(compiled_code, "__file__", str(package / "hardware/compiled_code.py"))
    before = compiled_code._key()
    compiled_code._key.cache_clear()
    if changed == "source":
        source.write_text("x = 2")
    elif changed == "processor":
        monkeypatch.setattr(compiled_code, "processor", lambda: "another")
    elif changed == "torch":
        monkeypatch.setattr(compiled_code.torch, "__version__", "99.0")
    assert (compiled_code._key() == before) == (changed == "nothing")


def test_folders_of_other_versions_go_when_they_are_not_used(kept: Path) -> None:
    days = {"old": 40, "recent": 20}
    for name, age in days.items():
        (kept / name).mkdir(parents=True)
        (kept / name / "code").write_text("x")
        os.utime(kept / name, (time.time() - age * 86400,) * 2)
    keep_compiled_code()
    own = Path(os.environ[VARIABLE]).name
    assert {path.name for path in kept.iterdir()} == {"recent", "headers", own}


PROGRAM = """
import torch
from mobilellm.hardware.compiled_code import keep_compiled_code
class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()
    @staticmethod
    def backward(ctx, grad):
        return grad * FACTOR
keep_compiled_code()
x = torch.ones(8, requires_grad=True)
torch.compile(lambda x: Scaled.apply(x) * 2)(x).sum().backward()
from torch._dynamo.utils import counters
print(int(x.grad[0]), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.long
def test_what_is_found_is_what_would_have_been_compiled(tmp_path: Path) -> None:
    """A function with a gradient of its own: kept, found again, and told from another one. Two
    processes may begin at once."""
    if not compiler_works():
        pytest.skip("no C++ compiler")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop(VARIABLE, None)

    def begun(factor: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM.replace("FACTOR", str(factor))]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    both = [begun(5), begun(5)]
    assert [one.communicate()[0].split()[0] for one in both] == ["10", "10"]
    assert begun(7).communicate()[0] == "14 0\n"
    assert begun(5).communicate()[0] == "10 1\n"
    assert begun(7).communicate()[0] == "14 1\n"
