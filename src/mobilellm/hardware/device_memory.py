"""Memory of a device: its size, the most that was held, and the errors that say it was too little.

On a GPU the figures are of tensors; on a CPU they are of the whole process and machine:

    total_memory(device)     # bytes: of the GPU, or the machine's main memory for a CPU
    peak_memory(device)      # bytes: of tensors on a GPU, of the whole process on a CPU
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

HUGE_PAGE = 2 << 20
NEIGHBORS = 1 << 16
"""Bytes between tensors that are taken for one span of memory."""
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of linux/mman.h


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the machine's main memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # On Linux getrusage's figure is inherited from the parent process; /proc has this process's
    # own.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let `peak_memory` of a CPU count from what is held now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def empty_cache(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later; of a CPU's where its C library can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def use_huge_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Lay the memory of CPU tensors on pages of 2 MiB, where the system can (Linux 6.1).

    Whoever reads all weights for each token waits for the addresses of small pages: on a virtual
    machine reading 538 MB was 1.5 times as fast with large ones (docs/log.md). The numbers stay
    where they are, and no more memory is held.
    """
    if not sys.platform.startswith("linux"):
        return
    spans: list[list[int]] = []
    for start, size in sorted((t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu"):
        if spans and start - spans[-1][1] < NEIGHBORS:
            spans[-1][1] = max(spans[-1][1], start + size)
        else:
            spans.append([start, start + size])
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for first, last in spans:
        start, stop = -(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE
        if start < stop:  # what the system refuses stays as it is
            advise(start, stop - start, MADV_HUGEPAGE)
            advise(start, stop - start, MADV_COLLAPSE)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device, or the main memory, had no room."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
