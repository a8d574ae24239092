"""Where torch.compile keeps what it compiled: in the user's cache, for the runs that come after.

    keep_compiled_code()      # before anything is compiled

torch keeps it in the temporary folder, which a restart empties and which every user of a machine
may write to. A run of 1M that finds nothing there spends 34 to 42 seconds of processor time before
its first step, and 7 where it finds all (docs/log.md).

The compiler names what it keeps by the graph, its settings and torch's version. The folder here is
named by torch, Python, the processor and our own source as well: operators of ours are only names
in a graph, and a home folder may be one for several machines. Entries appear whole, so that any
number of processes share a folder. TORCHINDUCTOR_CACHE_DIR, where it is set, is another choice.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

from mobilellm.files import cache_folder

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ALLOW = "autograd_cache_allow_custom_autograd_functions"
TRACED = ("kernels", "model", "objectives", "quantize")
"""Rooms whose source the compiler sees."""
HEADERS = "headers"
MAX_UNUSED_DAYS = 30
"""Of a folder of another version; then it is removed."""


def keep_compiled_code() -> None:
    """Let torch's compiler read and write the user's cache, unless it has another folder already.
    Where that cannot be written, the temporary folder stays."""
    import torch._functorch.config as config

    # Blocks hold functions with gradients of their own. They enter the graph as what they compute,
    # which is hashed with it; torch leaves them out of the cache unless told.
    if hasattr(config, ALLOW):
        setattr(config, ALLOW, True)
    if VARIABLE in os.environ:
        return
    folder, headers = (cache_folder() / "compiled" / name for name in (_key(), HEADERS))
    with contextlib.suppress(OSError):
        for each in (folder, headers):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.utime(each)
        os.environ[VARIABLE] = str(folder)
        _keep_headers(headers)
        _forget_unused(folder.parent)


def _keep_headers(folder: Path) -> None:
    """torch's own headers as its compiler reads them fastest: 6 seconds to make, 150 MB, the same
    for every version of ours. torch names them by content and compiler, and has no setting for
    their place; where its name for it is another, they stay in the temporary folder."""
    import torch._inductor.codecache as codecache

    if hasattr(codecache, "_HEADER_DIR") and hasattr(codecache, "_HEADER_LOCK_DIR"):
        codecache._HEADER_DIR = str(folder)
        codecache._HEADER_LOCK_DIR = str(folder / "locks")


def processor() -> str:
    """What this processor is and can do, as the system says it."""
    found = platform.machine() + platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        kinds = ("flags", "Features", "model name")
        found += "".join(sorted({line for line in lines if line.startswith(kinds)}))
    return found


@functools.cache
def _key() -> str:
    digest = hashlib.sha256("\0".join((sys.version, sys.prefix, processor())).encode())
    package = Path(__file__).parent.parent
    for path in sorted(path for room in TRACED for path in (package / room).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"torch-{torch.__version__}-{digest.hexdigest()[:16]}"


def _forget_unused(folder: Path) -> None:
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > MAX_UNUSED_DAYS * 86400:
            shutil.rmtree(path, ignore_errors=True)
