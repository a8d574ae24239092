"""What this device is good at: probed, never assumed.

On one 2-core AVX2 machine bfloat16 products run 300 times slower than float32, on one with AVX-512 BF16 four times
faster; nothing in their names tells. `resolve` turns every "auto" of a recipe into what is then written down with the run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mobilellm.hardware.devices import recognize

BF16_GAIN = 1.5  # how much faster bf16 products must be to be worth their rounding


def pick_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product, the best of `repeats`."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random state is left alone
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def fast_precision(device: torch.device) -> str:
    """ "bf16" where its products run well above float32's speed, else "fp32"."""
    # A small product first: where bf16 is emulated, a large one would take many seconds.
    small = {dtype: matmul_flops(device, dtype, 192) for dtype in (torch.bfloat16, torch.float32)}
    if small[torch.bfloat16] < 0.3 * small[torch.float32]:
        return "fp32"
    # Then one large enough to drown what a call costs; in turns, since other work may come and go meanwhile.
    rounds = [
        [matmul_flops(device, dtype, 1024, 3) for dtype in (torch.bfloat16, torch.float32)]
        for _ in range(4)
    ]
    bf16, fp32 = (max(column) for column in zip(*rounds, strict=True))
    return "bf16" if bf16 > BF16_GAIN * fp32 else "fp32"


def compiler_works() -> bool:
    """Whether torch.compile can build and run a trivial kernel here (it needs a C++ compiler and Python's headers)."""
    if not any(
        shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name
    ):
        return False
    try:
        return bool(torch.compile(lambda x: x.sin() * 2 + 1)(torch.zeros(4)).sum() == 4)
    except Exception:  # whatever goes wrong inside a compiler is a reason to do without it
        torch._dynamo.reset()
        return False


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of a device's matrix products: the maker's figure where the device is known, else measured."""
    if device.type == "cuda" and (known := recognize(torch.cuda.get_device_name(device))):
        return known.bf16 if precision == "bf16" else known.fp32
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    small = matmul_flops(device, dtype, 192, 3)
    return max(small, matmul_flops(device, dtype, 1024, 3) if small > 1e9 else small)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the main memory, had no room."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def empty_cache(device: torch.device) -> None:
    """Give back what the device's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(
        OSError, StopIteration
    ):  # Linux; getrusage's figure there is inherited from the parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def profiler(device: torch.device) -> torch.profiler.profile:
    """A profiler of the host and, where there is one, the GPU; its trace opens in chrome://tracing or Perfetto."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds, record_shapes=True)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, for environment.json."""
    import numpy
    import tokenizers

    import mobilellm

    versions = {"mobilellm": mobilellm.__version__, "python": platform.python_version(), "torch": torch.__version__,
                "numpy": numpy.__version__, "tokenizers": tokenizers.__version__}  # fmt: skip
    return versions | {
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this package runs from, marked when it has uncommitted changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
