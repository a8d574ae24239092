"""Matrix products of a training step on a CPU by oneDNN or by AMX, where that is faster.

torch's `F.linear` takes MKL in float32. On one AMD machine MKL reached 200 GFLOP/s where oneDNN
reached 280 to 500; on the next oneDNN was a tenth ahead in the output and the gradient by the
input, and behind in the gradient by the weight; on others they are equal (docs/log.md). So it is
measured, on the very shapes, when a run begins. Where a processor has AMX, its bfloat16 units do
float32's products by bf16x6.py. The run's recipe records what was chosen, so that a resumed run
computes the same bits; and the user's cache folder does for this machine, so that a second run of
the same recipe does too.

In bfloat16 torch has AMX's units by oneDNN, but for a gradient by the weight that is to be added up
in float32 over the chunks of an output layer: "amx" has it in one pass (and Muon's step, which is
optimizers/muon.py's own matter).

    kind = fastest_products([(2048, 576, 960)])     # "torch", "mixed", "onednn" or "bf16x6"
    with using(kind):
        y = product(x, weight)                      # x @ weight.T, with gradients
"""

from __future__ import annotations

import contextlib
import functools
import platform
import time
import typing
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.errors import UserError
from mobilellm.files import cache_folder, read_json, write_json
from mobilellm.hardware.description import cpu_name
from mobilellm.kernels import bf16x6, muon_step

Products = Literal["torch", "mixed", "onednn", "bf16x6", "amx"]
"""torch: its own choice in all. In float32, onednn: oneDNN in all; mixed: oneDNN but in the
gradient by the weight; bf16x6: six products of bfloat16 parts in all. In bfloat16, amx: of the
output layer's products the gradient by the weight."""
OF_FLOAT32: tuple[Products, ...] = ("torch", "mixed", "onednn", "bf16x6")
"""The kinds that multiply float32."""

MIN_GAIN = 1.03
"""How many times as fast as torch's own all products of the measured shapes must be together."""
MAX_ROWS = 2048
"""Rows of a measured product."""
MIN_FLOPS = 1e8
"""Of the largest product: below it nothing is measured, and torch's own are taken."""

ROUNDS, MAX_ROUNDS, SECONDS = 5, 25, 0.5
"""Turns of a layer's products by all kinds: the least, and as many as these seconds allow."""

_used: Products = "torch"


@functools.cache
def onednn_linear() -> Callable[..., Tensor] | None:
    """torch's product by oneDNN, which its compiler uses; None where this torch or this machine has
    none."""
    if (
        platform.machine().lower() not in ("x86_64", "amd64")
        or not torch.backends.mkldnn.is_available()
    ):
        return None
    product: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return product


def products_fault(kind: Products) -> str:
    """Why products cannot be those of `kind` here; empty where they can."""
    if kind == "torch":
        return ""
    if kind == "bf16x6":
        return bf16x6.fault()
    if kind == "amx":
        return bf16x6.fault() or muon_step.fault()
    return "" if onednn_linear() is not None else "torch has no oneDNN here"


@contextlib.contextmanager
def using(kind: Products) -> Iterator[None]:
    """In this block products with gradients are those of `kind`; their backward passes are too,
    wherever they run. `products_fault` says whether these can be had."""
    global _used
    before, _used = _used, kind
    try:
        yield
    finally:
        _used = before


def product(x: Tensor, weight: Tensor) -> Tensor | None:
    """x (..., in) times the transpose of weight (out, in), (..., out), by the kind that is used;
    None where torch is to do it: other types and devices, under autocast, and outside of `using`.
    """
    if (
        _used in ("torch", "amx")
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
        or type(weight) not in (Tensor, nn.Parameter)
    ):
        return None
    found: Tensor = _product(x, weight, _used)
    return found


def output_product(x: Tensor, weight: Tensor) -> Tensor | None:
    """As `product`, without gradients: None also where the kind that is used leaves these alone."""
    if _used != "bf16x6" or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return None
    return _multiply(x, weight, _used)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad (n, out) times weight (out, in), without gradients of its own."""
    if _used in ("torch", "amx") or grad.device.type != "cpu" or grad.dtype != torch.float32:
        return grad @ weight
    return _multiply(grad.contiguous(), weight.t(), _used)


def add_weight_gradient(to: Tensor | None, grad: Tensor, x: Tensor) -> Tensor:
    """`to` (out, in), float32, or zeros, plus the transpose of grad (n, out) times x (n, in)."""
    of = {"bf16x6": torch.float32, "amx": torch.bfloat16}.get(_used)
    if grad.device.type == "cpu" and grad.dtype == x.dtype == of:
        return bf16x6.multiply(grad.t(), x, out=to, add=to is not None)
    if to is None:
        return (grad.t() @ x).float()
    if grad.dtype == torch.float32:
        return to.addmm_(grad.t(), x)
    return to.add_(grad.t() @ x)


def _multiply(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """x (..., k) times the transpose of weight (m, k), either of which may be a transposed view."""
    if kind == "bf16x6":
        rows = x.reshape(-1, x.shape[-1])
        return bf16x6.multiply(rows, weight.t()).view(*x.shape[:-1], weight.shape[0])
    by = onednn_linear()
    assert by is not None
    return by(x, weight, None, "none", [], "")


@torch.library.custom_op("mobilellm::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return _multiply(x.contiguous(), weight.contiguous(), kind)


@_product.register_fake
def _(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("mobilellm::product_by_input", mutates_args=())
def _by_input(grad: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The gradient by the input: grad (n, out) times weight (out, in)."""
    return _multiply(grad.contiguous(), weight.t(), kind)


@_by_input.register_fake
def _(grad: Tensor, weight: Tensor, kind: str) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


@torch.library.custom_op("mobilellm::product_by_weight", mutates_args=())
def _by_weight(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient by the weight: the transpose of grad (n, out) times x (n, in)."""
    return _transposed(grad.contiguous(), x.contiguous(), kind)


def _transposed(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    if kind == "bf16x6":
        return bf16x6.multiply(grad.t(), x)
    if grad.shape[1] < x.shape[1]:
        return _multiply(grad.t(), x.t(), kind)
    # Faster where there are more outputs than inputs; autograd wants it in the weight's layout.
    return _multiply(x.t(), grad.t(), kind).t().contiguous()


@_by_weight.register_fake
def _(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    return grad.new_empty(grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, weight, ctx.kind = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    flat, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    by_x = by_weight = None
    if ctx.needs_input_grad[0]:
        by_x = _by_input(flat, weight, ctx.kind).view(x.shape)
    if ctx.needs_input_grad[1]:
        by_weight = flat.t() @ rows if ctx.kind == "mixed" else _by_weight(flat, rows, ctx.kind)
    return by_x, by_weight, None


_product.register_autograd(_gradients, setup_context=_keep)


def fastest_products(shapes: Sequence[tuple[int, int, int]]) -> Products:
    """The fastest kind for linear layers of these (rows, inputs, outputs) on this machine's CPU,
    forward and backward; measured once a process."""
    return _fastest(
        tuple((min(rows, MAX_ROWS), inputs, outputs) for rows, inputs, outputs in shapes),
        torch.get_num_threads(),
    )


@functools.cache
def _fastest(shapes: tuple[tuple[int, int, int], ...], threads: int) -> Products:
    if max(2.0 * n * i * o for n, i, o in shapes) < MIN_FLOPS:
        return "torch"
    tried = [kind for kind in OF_FLOAT32 if not products_fault(kind)]
    if tried == ["torch"]:
        return "torch"
    ours = f"{zlib.crc32(bf16x6.SOURCE.read_bytes()):08x}"
    known_by = (cpu_name(), torch.__version__, ours, threads, *tried, *shapes)
    key = " ".join(map(str, known_by))
    if (known := _remembered(key)) is not None:
        return known
    measured = [_measure(*shape) for shape in shapes]
    totals = {name: sum(each[name] for each in measured) for name in measured[0]}
    best = min(totals, key=lambda name: totals[name])
    chosen: Products = best if totals["torch"] > MIN_GAIN * totals[best] else "torch"
    _remember(key, chosen)
    return chosen


def _known() -> dict[str, Products]:
    """What was measured before; nothing where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, UserError):
        found = read_json(cache_folder() / "products.json", limit=1 << 20)
        if isinstance(found, dict):
            return {key: kind for key, kind in found.items() if kind in typing.get_args(Products)}
    return {}


def _remembered(key: str) -> Products | None:
    return _known().get(key)


def _remember(key: str, kind: Products) -> None:
    with contextlib.suppress(OSError, UserError):  # it is measured again then
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_json(cache_folder() / "products.json", _known() | {key: kind})


def _measure(rows: int, inputs: int, outputs: int) -> dict[Products, float]:
    """Seconds of one layer's three products by each kind that there is, each product the best of
    some rounds: others have the machine in some of them."""
    generator = torch.Generator().manual_seed(0)  # leaves the run's own random state alone
    with torch.no_grad():
        x, weight, grad = (
            torch.randn(shape, generator=generator)
            for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
        )
        # The output and both gradients.
        forms: dict[Products, list[Callable[[], Tensor]]] = {
            "torch": [lambda: F.linear(x, weight), lambda: grad @ weight, lambda: grad.t() @ x]
        }
        others: tuple[Products, ...] = ("onednn", "bf16x6")
        for kind in others:
            if not products_fault(kind):
                forms[kind] = [
                    functools.partial(_multiply, x, weight, kind),
                    functools.partial(_multiply, grad, weight.t(), kind),
                    functools.partial(_transposed, grad, x, kind),
                ]
        best = {kind: [float("inf")] * 3 for kind in forms}
        begun = time.perf_counter()
        for done in range(MAX_ROUNDS):
            if done >= ROUNDS and time.perf_counter() - begun > SECONDS:
                break
            for which in range(3):
                for kind, three in forms.items():
                    start = time.perf_counter()
                    three[which]()
                    best[kind][which] = min(best[kind][which], time.perf_counter() - start)
    found = {kind: sum(seconds) for kind, seconds in best.items()}
    if "onednn" in best:
        found["mixed"] = sum(best["onednn"][:2]) + best["torch"][2]
    return found
