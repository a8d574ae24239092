"""SwiGLU's gradient on a GPU, in one pass over memory: torch.ops.mobilellm.swiglu_backward.

torch's compiler makes each of the two halves of the gradient anew from all that is read, and takes
1.6 times as long as the bytes do (docs/log.md). Here a program makes both halves of its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.errors import UserError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise UserError(
        f"this needs Triton ({error})", hint="it comes with torch for an NVIDIA GPU"
    ) from None

ROWS = 4
"""Of a program."""
MAX_COLUMNS = 512
WARPS = 8


@triton.jit
def _backward(gate_up, grad, result, rows, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < WIDTH)
    at = row * (2 * WIDTH) + column
    gate = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    by_result = tl.load(grad + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    by_gate = by_result * up * (sigmoid + silu * (1 - sigmoid))
    kind = result.dtype.element_ty
    tl.store(result + at, by_gate.to(kind), mask=inside)
    tl.store(result + at + WIDTH, (by_result * silu).to(kind), mask=inside)


@torch.library.triton_op("mobilellm::swiglu_backward", mutates_args=())
def swiglu_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """The gradient by gate_up (..., 2 F) of silu(gate) * up, whose own is grad (..., F). Computed
    in float32, returned in gate_up's type."""
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    width = grad.shape[-1]
    rows, columns = grad.numel() // width, min(MAX_COLUMNS, triton.next_power_of_2(width))
    result = torch.empty_like(gate_up)
    torch.library.wrap_triton(_backward)[(triton.cdiv(rows, ROWS), triton.cdiv(width, columns))](
        gate_up, grad, result, rows, WIDTH=width, R=ROWS, C=columns, num_warps=WARPS
    )
    return result
