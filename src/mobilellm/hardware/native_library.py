"""C++ of ours as a library of this machine: compiled once by the compiler that is there, and kept.

    found = native_library(Path("step.cpp"))
    found.library, found.fault        # a ctypes.CDLL, or None and why

The file lies in the user's cache under a name that says source, compiler and processor, so that a
home folder which several machines share holds one for each. Compiling takes a few seconds, once.
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

FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-w",
)  # fmt: skip
NATIVE = ("-march=native", "-mcpu=native", "")
"""Ways of asking for all that this processor can do; the first that the compiler takes."""
HEADERS = Path(__file__).parent
"""Where vectors.h lies, which sources include."""
COMPILERS = ("g++", "clang++", "c++")
MAX_SECONDS = 120


@dataclass(frozen=True)
class Build:
    """What came of compiling a source."""

    library: ctypes.CDLL | None
    fault: str
    """Why there is no library; empty where there is one."""


def cpp_compiler() -> str | None:
    """Where the C++ compiler of CXX lies, or else the first of `COMPILERS` that is there."""
    names = (os.environ.get("CXX", ""), *COMPILERS)
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def native_library(source: Path, *options: str) -> Build:
    """The library of a source with these options of the compiler beside `FLAGS`, compiled where the
    cache does not hold it."""
    compiler = cpp_compiler()
    if compiler is None:
        return Build(None, "there is no C++ compiler (g++ or clang++)")
    flags = (*FLAGS, *options)
    path = cache_folder() / "native" / f"{source.stem}-{_key(source, compiler, flags)}.so"
    for attempt in ("kept", "compiled"):
        try:
            if attempt == "compiled":
                _compile(source, compiler, flags, path)
            elif not path.is_file():
                continue
            return Build(ctypes.CDLL(str(path)), "")
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            reason = next((line for line in str(said).splitlines() if line.strip()), "")
    return Build(None, f"{compiler} did not compile it ({reason})")


def _key(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    """Names what a library depends on."""
    try:
        stamp = str(os.stat(os.path.realpath(compiler)).st_mtime_ns)
    except OSError:
        stamp = ""
    texts = [path.read_text() for path in (source, *sorted(HEADERS.glob("*.h")))]
    said = "\0".join((*texts, compiler, stamp, processor(), *flags))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _compile(source: Path, compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Put the library at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        for native in NATIVE:
            options = [*flags, *([native] if native else []), "-I", str(HEADERS)]
            done = subprocess.run(
                [compiler, *options, "-o", str(made), str(source)],
                capture_output=True,
                text=True,
                timeout=MAX_SECONDS,
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        sync(made)
        os.replace(made, path)
