"""bf16x6.cpp, compiled for this machine: float32 matrix products by the units for bfloat16 that
processors with AMX have, no less exact than float32's own; and bfloat16 ones with float32 results.

    if not fault():
        c = multiply(a, b)                  # a @ b
        multiply(a, b, out=c, add=True)     # c += a @ b

A number is taken as the sum of three of bfloat16, and of their nine products six are computed. On
numbers of one size the error against float64 is a half to two thirds of MKL's (docs/log.md). The
units take what is below 1.2e-38 as zero, parts and products: results below 1e-31 and factors below
1e-33 lose digits. Infinities and factors above 3.39e38 give NaN.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mobilellm.kernels.amx import amx_library

SOURCE = Path(__file__).with_name("bf16x6.cpp")

PARTS = {torch.float32: 3, torch.bfloat16: 1}
"""Numbers of bfloat16 that make one."""

pointer, number = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [("data", pointer), ("row", number), ("column", number)]


class _Product(ctypes.Structure):
    """As bf16x6.cpp has it."""

    _fields_ = [
        ("A", _Matrix),
        ("B", _Matrix),
        ("C", pointer),
        ("M", number),
        ("N", number),
        ("K", number),
        ("parts", number),
        ("add", number),
        ("threads", number),
    ]


def fault() -> str:
    """Why there are no such products here; empty where there are."""
    found = amx_library(SOURCE, "mobilellm_bf16x6")
    return found if isinstance(found, str) else ""


def multiply(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a (M, K) times b (K, N), both float32 or both bfloat16 on the CPU, in float32: written or
    with `add` added to `out` (M, N), a contiguous one, where it is given. Either factor may be a
    transposed view.

    `RuntimeError`, as torch has it, for shapes and types that do not fit.
    """
    found = amx_library(SOURCE, "mobilellm_bf16x6")
    assert not isinstance(found, str)
    M, K = a.shape
    N = b.shape[1]
    if b.shape[0] != K or a.dtype != b.dtype or a.dtype not in PARTS:
        raise RuntimeError(f"({M}, {K}) {a.dtype} times {tuple(b.shape)} {b.dtype}")
    if out is not None and (
        out.shape != (M, N) or out.dtype != torch.float32 or not out.is_contiguous()
    ):
        raise RuntimeError(f"({M}, {N}) into {tuple(out.shape)} {out.dtype}")
    a, b = (t if 1 in t.stride() else t.contiguous() for t in (a, b))
    if out is None:
        out = a.new_empty(M, N, dtype=torch.float32)
    if K == 0 and not add:
        out.zero_()
    call = _Product(
        A=_Matrix(a.data_ptr(), *_strides(a)),
        B=_Matrix(b.data_ptr(), *_strides(b.t())),
        C=out.data_ptr(),
        M=M,
        N=N,
        K=K,
        parts=PARTS[a.dtype],
        add=add,
        threads=torch.get_num_threads(),
    )
    if M and N and K:
        found(ctypes.byref(call))
    return out


def _strides(t: Tensor) -> tuple[int, int]:
    """(row, column) of which one is 1, also where a dimension of length 1 has another."""
    row, column = t.stride()
    return (row, column) if 1 in (row, column) else (t.shape[1], 1)
