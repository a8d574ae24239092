"""Kernels for a GPU, as far as a CPU can tell: benchmarks/gpu_check.py compares them on one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mobilellm.kernels import gpu
from mobilellm.model.fused import swiglu

INTERPRETED = """
import torch
torch.library.wrap_triton = lambda kernel: kernel    # which wants a compiled one
from mobilellm.kernels.swiglu_triton import swiglu_backward

for shape, dtype, bound in (
    ((3, 5, 192), torch.float32, 1e-6),
    ((1, 1, 1200), torch.float32, 1e-6),
    ((2, 7, 3072), torch.bfloat16, 5e-3),
):
    x = torch.randn(shape, dtype=dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, dtype=dtype)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    (torch.nn.functional.silu(gate) * up * grad.double()).sum().backward()
    found = swiglu_backward(x, grad)
    assert found.dtype == dtype
    assert (found.double() - exact.grad).norm() < bound * exact.grad.norm(), shape
"""


def test_a_cpu_has_none_and_needs_none() -> None:
    gpu.load(torch.device("cpu"))
    assert not gpu.loaded()
    x = torch.randn(2, 8, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
def test_swiglus_gradient_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
