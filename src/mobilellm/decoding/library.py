"""step.cpp as a library of this machine: compiled once by the C++ compiler that is there, and kept.

    library()          # the loaded library, or None with the reason in `fault()`

The file lies in the user's cache under a name that says source, compiler and processor, so that a
home folder which several machines share holds one for each. Compiling takes a few seconds, once.
Without a compiler nothing fails: tokens then come from torch's own products.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobilellm.files import cache_folder, sync
from mobilellm.hardware.compiled_code import processor

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-w",
)  # fmt: skip
NATIVE = ("-march=native", "-mcpu=native", "")
"""Ways of asking for all that this processor can do; the first that the compiler takes."""
COMPILERS = ("g++", "clang++", "c++")
MAX_SECONDS = 120


@dataclass(frozen=True)
class Build:
    """What came of it."""

    library: ctypes.CDLL | None
    fault: str
    """Why there is no library; empty where there is one."""


def library() -> ctypes.CDLL | None:
    """The library with its functions' signatures set; None where it cannot be had."""
    return build().library


def fault() -> str:
    """Why `library` is None; empty where it is not."""
    return build().fault


@functools.cache
def build() -> Build:
    """The library, compiled where the cache does not hold it."""
    given = os.environ.get("CXX", "")
    compiler = next((found for name in (given, *COMPILERS) if (found := shutil.which(name))), None)
    if compiler is None:
        return Build(None, "there is no C++ compiler (g++ or clang++)")
    path = cache_folder() / "decoding" / f"step-{_key(compiler)}.so"
    for attempt in ("kept", "compiled"):
        try:
            if attempt == "compiled":
                _compile(compiler, path)
            elif not path.is_file():
                continue
            return Build(_signed(ctypes.CDLL(str(path))), "")
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            reason = next((line for line in str(said).splitlines() if line.strip()), "")
    return Build(None, f"{compiler} did not compile it ({reason})")


def _key(compiler: str) -> str:
    """Names what a library depends on."""
    try:
        stamp = str(os.stat(os.path.realpath(compiler)).st_mtime_ns)
    except OSError:
        stamp = ""
    said = "\0".join((SOURCE.read_text(), compiler, stamp, processor(), *FLAGS))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Put the library at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        for native in NATIVE:
            options = [*FLAGS, *([native] if native else []), "-o", str(made), str(SOURCE)]
            done = subprocess.run(
                [compiler, *options], capture_output=True, text=True, timeout=MAX_SECONDS
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        sync(made)
        os.replace(made, path)


def _signed(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.mobilellm_open.argtypes, found.mobilellm_open.restype = [pointer, number], pointer
    found.mobilellm_step.argtypes = [
        pointer, pointer, number, number, pointer, pointer, pointer, number,
    ]  # fmt: skip
    found.mobilellm_step.restype = None
    found.mobilellm_close.argtypes, found.mobilellm_close.restype = [pointer], None
    return found
