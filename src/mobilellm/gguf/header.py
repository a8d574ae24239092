"""The header of a GGUF file.

    header = read_header(Path("m.gguf"), {0: (1, 4), 1: (1, 2)})     # F32 and F16
    header.keys["general.architecture"], header.tensors["token_embd.weight"].shape

Every count and length is checked against the file before memory is taken for it. The format: magic,
version, tensor count, key count; keys with typed values; tensor names, shapes, types and offsets;
then the data, aligned (github.com/ggml-org/ggml, docs/gguf.md). Little-endian versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError

# Number of a value's type -> its struct code.
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9
MAX_HEADER = 96 << 20  # bytes: the largest vocabularies need a fifth of that
MAX_DEPTH = 2  # arrays in arrays
MAX_VALUES = 1 << 22  # in all arrays together; the largest vocabularies have a third of that
MAX_KEYS, MAX_TENSORS = 1 << 14, 1 << 17


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as numpy has it (the file has it the other way round)."""
    type: int
    """ggml's number of the type."""
    offset: int
    """From the start of the file, bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class GGUFHeader:
    """Keys and tensors."""

    keys: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Reader:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.position, self.where = data, 0, where
        self.values = 0
        """Of the arrays read so far."""

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}", hint="not a whole GGUF file: fetch it again")

    def take(self, size: int) -> bytes:
        if size < 0 or size > len(self.data) - self.position:
            raise self.fault(
                f"cut off, or a length of {size} that the file does not have, "
                f"at byte {self.position}"
            )
        piece = self.data[self.position : self.position + size]
        self.position += size
        return piece

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or depth >= MAX_DEPTH:
            raise self.fault(f"a value of unknown type {kind}")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        # As Python's objects they take far more memory than in the file.
        self.values += count
        if self.values > MAX_VALUES:
            raise self.fault(f"arrays of more than {MAX_VALUES} values")
        if inner in SCALARS:
            size = struct.calcsize(SCALARS[inner])
            return list(struct.unpack(f"<{count}{SCALARS[inner][1]}", self.take(count * size)))
        # A string takes 8 bytes at least: those of its length.
        if count > (len(self.data) - self.position) // 8:
            raise self.fault(f"an array of {count} values")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_header(path: Path, type_sizes: dict[int, tuple[int, int]]) -> GGUFHeader:
    """Read and check a header.

    `type_sizes` maps ggml's types to (numbers, bytes) of a block. `UserError` for a file that is
    not whole.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        reader = _Reader(file.read(min(size, MAX_HEADER)), str(path))
    if reader.take(4) != b"GGUF":
        raise reader.fault("no GGUF magic")
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version}; 2 and 3, little-endian, are read")
    tensor_count, key_count = reader.scalar("<Q"), reader.scalar("<Q")
    if tensor_count > min(MAX_TENSORS, size // 24) or key_count > min(MAX_KEYS, size // 12):
        raise reader.fault(f"{tensor_count} tensors and {key_count} keys")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = reader.string()
        keys[name] = reader.value(reader.scalar("<I"))
    found: list[tuple[str, tuple[int, ...], int, int, int]] = []
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.scalar("<I")
        if not 1 <= dimensions <= 4:
            raise reader.fault(f"tensor {name!r} of {dimensions} dimensions")
        shape = tuple(reader.scalar("<Q") for _ in range(dimensions))[::-1]
        kind, offset = reader.scalar("<I"), reader.scalar("<Q")
        if kind not in type_sizes:
            raise reader.fault(f"tensor {name!r} of unknown type {kind}")
        numbers, block = type_sizes[kind]
        if not all(0 < n <= 1 << 40 for n in shape) or shape[-1] % numbers:
            raise reader.fault(f"tensor {name!r} of shape {shape}, which its type cannot have")
        found.append((name, shape, kind, offset, math.prod(shape) // numbers * block))
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise reader.fault(f"an alignment of {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset, length in found:
        if offset > size or length > size or start + offset + length > size:
            raise reader.fault(f"tensor {name!r} reaches beyond the end of the file")
        if name in tensors:
            raise reader.fault(f"tensor {name!r} occurs twice")
        tensors[name] = TensorInfo(name, shape, kind, start + offset, length)
    end, before = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise reader.fault(f"tensors {before!r} and {info.name!r} overlap")
        end, before = info.offset + info.size, info.name
    return GGUFHeader(keys, tensors)
