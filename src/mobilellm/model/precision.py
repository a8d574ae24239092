"""The precision in which matrix products run: its name, its dtype, its size, and the context that
sets it.

Weights, softmax, norms and losses stay float32 under either; what changes is the type that enters
a product. This module imports torch only when it is asked for a dtype or a context, so that the
command line and the recipe can name precisions without loading it.

    precision = Precision("bf16")            # from a recipe or the command line
    with precision.autocast(device):
        loss = network.loss(inputs, targets)
"""

from __future__ import annotations

import contextlib
import enum
from typing import TYPE_CHECKING, NoReturn

from mobilellm.errors import unknown_name

if TYPE_CHECKING:
    import torch


class Precision(str, enum.Enum):
    """What matrix products compute in. Each value is the string that recipes use.

    `Precision(name)` raises `UserError` for a name that is none of them.
    """

    FP32 = "fp32"
    BF16 = "bf16"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise unknown_name("precision", str(value), [known.value for known in cls])

    @classmethod
    def fast_on(cls, device: torch.device) -> Precision:
        """BF16 where `device` multiplies it well faster than float32, which is measured; else
        FP32."""
        from mobilellm.hardware.probes import bf16_is_fast

        return cls.BF16 if bf16_is_fast(device) else cls.FP32

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that enter a product."""
        import torch

        return torch.bfloat16 if self is Precision.BF16 else torch.float32

    @property
    def bytes(self) -> int:
        """Bytes of one such number."""
        return 2 if self is Precision.BF16 else 4

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """The context in which products on `device` run in this precision."""
        import torch

        if self is Precision.FP32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.dtype)
