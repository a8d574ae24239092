"""step.cpp, compiled for this machine (hardware/native_library.py).

    library()          # the loaded library, or None with the reason in `fault()`

Without a compiler nothing fails: tokens then come from torch's own products.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from mobilellm.hardware.native_library import native_library

SOURCE = Path(__file__).with_name("step.cpp")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its functions' signatures set; None where it cannot be had."""
    found = native_library(SOURCE).library
    if found is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.mobilellm_open.argtypes, found.mobilellm_open.restype = [pointer, number], pointer
    found.mobilellm_step.argtypes = [
        pointer, pointer, number, number, pointer, pointer, pointer, number,
    ]  # fmt: skip
    found.mobilellm_step.restype = None
    found.mobilellm_close.argtypes, found.mobilellm_close.restype = [pointer], None
    return found


def fault() -> str:
    """Why `library` is None; empty where it is not."""
    return native_library(SOURCE).fault
