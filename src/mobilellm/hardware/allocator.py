"""How the C library deals with memory that tensors on a CPU free."""

from __future__ import annotations

import contextlib
import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for what it allocates next; whether the C
    library takes it (glibc does).

    A step frees and takes the same few hundred megabytes again and again. glibc gives large pieces
    back to the system, which hands them out again as pages of zeros: a tenth of a step
    (docs/log.md). The peak stays what it is; what is held after a peak is that peak."""
    if platform.libc_ver()[0] != "glibc":
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30)) & bool(
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        )
    return False
