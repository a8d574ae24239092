"""muon.cpp, compiled for this machine: a step of Muon by the bfloat16 units of a processor with
AMX.

    if not fault():
        step([Moved(gradient, momentum, weight, amount=0.05, kept=0.99, scale=0.1)], (a, b, c), 5)

Momentum, orthogonalization and update of a matrix in one pass over it; what optimizers/muon.py
computes with torch in bfloat16, with a rounding less. Three times as fast on matrices of 192 by 512
(docs/log.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mobilellm.kernels.amx import amx_library

SOURCE = Path(__file__).with_name("muon.cpp")
LEAST_NORM = 1e-7
"""What a direction is divided by at least."""

pointer, number, single = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Moved(ctypes.Structure):
    """As muon.cpp has it."""

    _fields_ = [
        ("gradient", pointer),
        ("momentum", pointer),
        ("weight", pointer),
        ("rows", number),
        ("columns", number),
        ("amount", single),
        ("kept", single),
        ("scale", single),
    ]


class _Step(ctypes.Structure):
    """As muon.cpp has it."""

    _fields_ = [
        ("matrices", pointer),
        ("count", number),
        ("iterations", number),
        ("a", single),
        ("b", single),
        ("c", single),
        ("least", single),
        ("threads", number),
    ]


@dataclass(frozen=True)
class Moved:
    """A matrix, and how far it goes. The three tensors (rows, columns) are float32 on the CPU and
    contiguous; momentum and weight are changed."""

    gradient: Tensor
    momentum: Tensor
    weight: Tensor
    amount: float
    """Of the gradient in the momentum, and once more in the direction (Nesterov)."""
    kept: float
    """What the weight is multiplied by: 1 less its decay."""
    scale: float
    """Of the orthogonalized direction, which is taken from the weight."""


def fault() -> str:
    """Why there is no such step here; empty where there is."""
    found = amx_library(SOURCE, "mobilellm_muon")
    return found if isinstance(found, str) else ""


def step(
    matrices: Sequence[Moved], coefficients: tuple[float, float, float], iterations: int
) -> None:
    """Take the gradients into the momenta, and move the weights by the directions as so many
    iterations of Newton-Schulz with these coefficients make them orthogonal.

    `RuntimeError`, as torch has it, for tensors that do not fit.
    """
    found = amx_library(SOURCE, "mobilellm_muon")
    assert not isinstance(found, str)
    for matrix in matrices:
        for t in (matrix.gradient, matrix.momentum, matrix.weight):
            if (
                t.shape != matrix.weight.shape
                or t.ndim != 2
                or t.dtype != torch.float32
                or t.device.type != "cpu"
                or not t.is_contiguous()
            ):
                raise RuntimeError(
                    f"a matrix {tuple(matrix.weight.shape)} with {tuple(t.shape)} {t.dtype}"
                )
    given = (_Moved * len(matrices))(
        *(
            _Moved(
                gradient=each.gradient.data_ptr(),
                momentum=each.momentum.data_ptr(),
                weight=each.weight.data_ptr(),
                rows=each.weight.shape[0],
                columns=each.weight.shape[1],
                amount=each.amount,
                kept=each.kept,
                scale=each.scale,
            )
            for each in matrices
        )
    )
    a, b, c = coefficients
    call = _Step(
        matrices=ctypes.addressof(given),
        count=len(matrices),
        iterations=iterations,
        a=a,
        b=b,
        c=c,
        least=LEAST_NORM,
        threads=torch.get_num_threads(),
    )
    found(ctypes.byref(call))
