"""Dropout (arXiv 1207.0580) that costs little on a CPU: eight numbers are decided by one draw.

    x = dropped(x, 0.1)          # where gradients are taken; elsewhere x itself

torch's own draws a number for each of x, which takes a fifth of a small network's step on one core;
this takes a quarter of that, and draws alike compiled and eager.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 256
"""A rate is rounded to a multiple of 1 / STEPS: a byte decides."""


def dropped(x: Tensor, rate: float) -> Tensor:
    """x with a share `rate` of its numbers 0 and the others scaled up, so that its mean stays.

    torch's generator draws. Outside of training, where no gradients are taken, it is x itself.
    """
    bound = round(STEPS * rate)
    if not bound or not torch.is_grad_enabled():
        return x
    # Without its bounds a draw leaves the highest bit 0, and with it that of every eighth byte.
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    drawn = words.random_(-(1 << 63), None).view(torch.uint8)
    keep = drawn[: x.numel()].view(x.shape) >= bound
    return x * keep * (STEPS / (STEPS - bound))
