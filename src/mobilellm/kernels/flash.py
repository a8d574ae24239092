"""attention.cpp, compiled for this machine: causal attention in tiles, and its gradients.

    if not fault(torch.bfloat16):
        out, log_total = attend(query, key, value, None)
        by_query, by_key, by_value = gradients(grad, query, key, value, out, log_total, None)

The products of tiles are oneDNN's, which torch's own attention calls too (`cpublas::brgemm`): this
library asks torch for their addresses by names that say their arguments, so that a torch which has
none, or others, leaves the attention to attention.py. So do processors without AVX-512, on which
torch's attention is the faster one in float32 (docs/log.md), and machines without a C++ compiler.

What a run takes is decided when it begins and recorded with its recipe, as its bits depend on it:

    with using_tiles(True):
        tiles_are_used()        # True
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mobilellm.hardware.native_library import native_library

SOURCE = Path(__file__).with_name("attention.cpp")
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllb"
HALF_PRODUCT = _BRGEMM + "PKN3c108BFloat16ES5_Pfb"
SINGLE_PRODUCT = _BRGEMM + "PKfS3_Pfb"
RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
COULD_PACK = "_ZN2at6native7cpublas10could_packEN3c1010ScalarTypeE"
BFLOAT16 = 15  # as c10::ScalarType numbers it

pointer, number = ctypes.c_void_p, ctypes.c_int64


class _Products(ctypes.Structure):
    _fields_ = [("half", pointer), ("single", pointer), ("release", pointer)]


class _Array(ctypes.Structure):
    _fields_ = [("data", pointer), ("batch", number), ("head", number), ("row", number)]


class _Attention(ctypes.Structure):
    """As attention.cpp has it."""

    _fields_ = [
        ("products", _Products),
        ("half", number),
        ("batch", number),
        ("heads", number),
        ("kv_heads", number),
        ("length", number),
        ("head_dim", number),
        ("scale", ctypes.c_double),
        ("query", _Array),
        ("key", _Array),
        ("value", _Array),
        ("out", _Array),
        ("log_total", pointer),
        ("mask", pointer),
        ("mask_batch", number),
        ("mask_row", number),
        ("space", pointer),
        ("threads", number),
        ("grad", _Array),
        ("grad_query", _Array),
        ("grad_key", _Array),
        ("grad_value", _Array),
    ]


@functools.cache
def _library() -> tuple[ctypes.CDLL, _Products, bool] | str:
    """The library, torch's products, and whether those of bfloat16 are among them; or why it cannot
    be had."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "this processor has no AVX-512"
    build = native_library(SOURCE, "-fopenmp")
    found = build.library
    if found is None:
        return build.fault
    try:
        ours = ctypes.CDLL("libtorch_cpu.so")  # as it is loaded already
        could_pack = getattr(ours, COULD_PACK)
        could_pack.argtypes, could_pack.restype = [ctypes.c_int8], ctypes.c_bool
        names = (HALF_PRODUCT, SINGLE_PRODUCT, RELEASE)
        products = _Products(*(ctypes.cast(getattr(ours, name), pointer) for name in names))
    except (OSError, AttributeError):
        return f"torch {torch.__version__} has not the products that it wants"
    found.mobilellm_attention_space.argtypes = [pointer, number]
    found.mobilellm_attention_space.restype = number
    for call in (found.mobilellm_attention, found.mobilellm_attention_gradients):
        call.argtypes, call.restype = [pointer], None
    return found, products, could_pack(BFLOAT16)


def fault(dtype: torch.dtype) -> str:
    """Why attention of this type cannot be computed here; empty where it can."""
    found = _library()
    if isinstance(found, str):
        return found
    if dtype == torch.float32 or (dtype == torch.bfloat16 and found[2]):
        return ""
    return f"no products of {str(dtype).removeprefix('torch.')} for it here"


_used = False


@contextlib.contextmanager
def using_tiles(on: bool) -> Iterator[None]:
    """In this block `tiles_are_used` gives `on`."""
    global _used
    before, _used = _used, on
    try:
        yield
    finally:
        _used = before


def tiles_are_used() -> bool:
    """Whether attention with gradients is to be computed here."""
    return _used


def rows_first(like: Tensor) -> Tensor:
    """An empty (B, H, T, D) that lies in memory as (B, T, H, D), as the projections around
    attention have it."""
    B, H, T, D = like.shape
    return like.new_empty(B, T, H, D).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """query (B, H, T, D), key and value (B, K, T, D), D even -> attended (B, H, T, D), which
    lies in memory as (B, T, H, D), and the log of its softmax's sum (B, H, T), float32.

    `mask` (B or 1, 1, T, T), bool, allows less than causality does; each token must see itself."""
    B, H, T, _ = query.shape
    out = rows_first(query)
    log_total = torch.empty(B, H, T)
    _run((query, key, value), out, log_total, mask, ())
    return out, log_total


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_total: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those by query, key and value, given that by `out`, which with `log_total` is what `attend`
    gave. That by query lies in memory as (B, T, H, D)."""
    by_query = rows_first(query)
    by_key, by_value = (t.new_empty(t.shape) for t in (key, value))
    _run((query, key, value), out, log_total, mask, (grad, by_query, by_key, by_value))
    return by_query, by_key, by_value


def _run(
    inputs: Sequence[Tensor],
    out: Tensor,
    log_total: Tensor,
    mask: Tensor | None,
    by: Sequence[Tensor],
) -> None:
    """Call the library: the output, or with `by` the gradients."""
    found = _library()
    assert not isinstance(found, str)
    library, products, _ = found
    query, key, value = (_in_pairs(t) for t in inputs)
    out, log_total = _in_pairs(out), log_total.contiguous()
    B, H, T, D = query.shape
    grads = (_in_pairs(by[0]), *by[1:]) if by else ()
    seen = None if mask is None else mask.contiguous().expand(B, 1, T, T)
    call = _Attention(
        products=products,
        half=query.dtype == torch.bfloat16,
        batch=B,
        heads=H,
        kv_heads=key.shape[1],
        length=T,
        head_dim=D,
        scale=D**-0.5,
        query=_array(query),
        key=_array(key),
        value=_array(value),
        out=_array(out),
        log_total=log_total.data_ptr(),
        threads=torch.get_num_threads(),
    )
    if seen is not None:
        call.mask, call.mask_batch, call.mask_row = seen.data_ptr(), seen.stride(0), seen.stride(2)
    if grads:
        call.grad, call.grad_query, call.grad_key, call.grad_value = map(_array, grads)
    size = library.mobilellm_attention_space(ctypes.byref(call), bool(grads))
    space = torch.empty(size, dtype=torch.uint8)
    call.space = space.data_ptr()
    run = library.mobilellm_attention_gradients if grads else library.mobilellm_attention
    run(ctypes.byref(call))


def _in_pairs(t: Tensor) -> Tensor:
    """Itself, or a copy where the numbers of a head do not lie side by side or at an odd distance:
    they are read two at a time."""
    *distances, last = t.stride()
    return t if last == 1 and not any(n % 2 for n in distances) else t.contiguous()


def _array(t: Tensor) -> _Array:
    return _Array(t.data_ptr(), *t.stride()[:3])
