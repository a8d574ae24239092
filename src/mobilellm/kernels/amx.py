"""Libraries of ours for the bfloat16 units of a processor with AMX, or why they cannot be had.

    found = amx_library(Path("muon.cpp"), "mobilellm_muon")
    if not isinstance(found, str):
        found(call)                 # the address of a structure

A library includes hardware/tiles.h, and its function takes the address of one structure.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.hardware.compiled_code import processor
from mobilellm.hardware.native_library import native_library


@functools.cache
def amx_library(source: Path, name: str) -> Callable[[Any], None] | str:
    """The function of a source, or why it cannot be had."""
    if "amx_bf16" not in processor():
        return "this processor has no AMX"
    build = native_library(source, "-fopenmp")
    if build.library is None:
        return build.fault
    allowed = build.library.mobilellm_tiles_allowed
    allowed.restype = ctypes.c_int64
    if not allowed():
        return "the compiler or the kernel here does not give AMX"
    function = build.library[name]
    function.argtypes = [ctypes.c_void_p]
    function.restype = None
    called: Callable[[Any], None] = function
    return called
