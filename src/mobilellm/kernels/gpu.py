"""Whether there are kernels of our own for a GPU, by Triton.

load(device)                       # when a run begins; does nothing on a CPU
if loaded(): ...                   # torch.ops.mobilellm.swiglu_backward is there
"""

from __future__ import annotations

import importlib.util

import torch

from mobilellm.hardware.probes import compiler_works

_loaded = False


def load(device: torch.device) -> None:
    """Make the kernels known where they can run: on a GPU, with Triton and a C compiler."""
    global _loaded
    if (
        not _loaded
        and device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and compiler_works(device)
    ):
        import mobilellm.kernels.swiglu_triton  # noqa: F401

        _loaded = True


def loaded() -> bool:
    """Whether they are there."""
    return _loaded
