"""One array of a token folder as a file: a plain .npy with a header of fixed length,
memory-mapped.

    array = map_shard(Path("train/wiki-00000.npy"), np.dtype("<u2"), count=134_217_728)

Beside a shard of tokens lie the ends of its documents and, where some of its tokens are not
trained on, a bit a token that says which are.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.errors import UserError

HEADER_BYTES = 128
ENDS = np.dtype("<u8")  # the position just after each document's last token
MASK = np.dtype("|u1")  # eight tokens a byte, the first in the highest bit (numpy.packbits)
PREPARE_AGAIN = "prepare the data again"


def ends_file(shard: Path) -> Path:
    """The file of document ends beside a shard."""
    return shard.with_suffix(".ends.npy")


def mask_file(shard: Path) -> Path:
    """The file that says which tokens of a shard are trained on."""
    return shard.with_suffix(".mask.npy")


def mask_bytes(tokens: int) -> int:
    """Bytes of the mask of so many tokens."""
    return -(-tokens // 8)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type for tokens of this vocabulary: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def header(dtype: np.dtype[Any], count: int) -> bytes:
    """A version 1.0 .npy header of fixed length: the count may be filled in when it is known, at
    the end."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(HEADER_BYTES - 11).encode()
        + b"\n"
    )


def check_header(path: Path, dtype: np.dtype[Any], count: int) -> None:
    """`UserError` unless an .npy file's header says what the manifest says: `count` values of
    `dtype`, 1-D."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    expected = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
    if head[:10] != b"\x93NUMPY\x01\x00v\x00" or head[10:].decode("latin-1").strip() != expected:
        raise UserError(
            f"{path}: not the array of {count} {dtype} values that the manifest describes",
            hint=PREPARE_AGAIN,
        )


def map_shard(
    path: Path, dtype: np.dtype[Any], count: int, scattered: bool = False
) -> NDArray[Any]:
    """Memory-map a file whose header is as expected; `scattered` is for reading samples here and
    there."""
    check_header(path, dtype, count)
    if count == 0:
        return np.empty(0, dtype=dtype)
    mapped = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    if scattered and hasattr(mmap, "MADV_RANDOM"):
        # Else each sample that is not in memory brings in all that lies around it: 2 ms instead of
        # 0.1 on the machine measured.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return mapped
