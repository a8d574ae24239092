"""What this machine is good at, measured and never assumed.

A processor's name does not tell whether it multiplies bfloat16 quickly. On one 2-core AVX2 machine
bfloat16 products run 300 times slower than float32; on one with AVX-512 BF16 they run four times
faster. So each question that a run asks of the machine is answered by trying:

    device = pick_device()
    bf16_is_fast(device)                          # True or False
    peak = peak_flops(device, torch.bfloat16)     # FLOP/s of a matrix product alone
"""

from __future__ import annotations

import time

import torch

from mobilellm.hardware.compiled_code import keep_compiled_code
from mobilellm.hardware.devices import recognize
from mobilellm.hardware.native_library import cpp_compiler

MIN_BF16_GAIN = 1.5
"""How many times as fast bf16 products must be to be worth their rounding."""


def pick_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 7) -> float:
    """FLOP/s of a product of two (size, size) matrices, the best of `repeats`."""
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's own random state alone
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products are well faster than float32's here."""
    # A small product comes first: where bf16 is emulated, a large one would take many seconds.
    small = {dtype: matmul_flops(device, dtype, 192) for dtype in (torch.bfloat16, torch.float32)}
    if small[torch.bfloat16] < 0.3 * small[torch.float32]:
        return False
    # The large product outweighs what a call costs. The two take turns, since other work may come
    # and go meanwhile.
    rounds = [
        [matmul_flops(device, dtype, 1024, 3) for dtype in (torch.bfloat16, torch.float32)]
        for _ in range(4)
    ]
    bf16, fp32 = (max(column) for column in zip(*rounds, strict=True))
    return bf16 > MIN_BF16_GAIN * fp32


def compiler_works(device: torch.device | None = None) -> bool:
    """Whether torch.compile builds and runs a trivial kernel on a device, the CPU where none is
    given. It needs a C++ compiler and Python's headers, on a GPU Triton."""
    if cpp_compiler() is None:
        return False
    keep_compiled_code()
    try:
        zeros = torch.zeros(4, device=device)
        return bool(torch.compile(lambda x: x.sin() * 2 + 1)(zeros).sum() == 4)
    except Exception:  # whatever goes wrong inside a compiler is a reason to do without it
        torch._dynamo.reset()
        return False


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of a device's matrix products in `dtype`.

    It is the maker's figure for a device in the table, else a measured one.
    """
    if device.type == "cuda" and (known := recognize(torch.cuda.get_device_name(device))):
        return known.peak_flops(dtype)
    small = matmul_flops(device, dtype, 192)
    return max(small, matmul_flops(device, dtype, 1024, 3) if small > 1e9 else small)
