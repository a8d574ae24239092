"""The tensors of a safetensors file, mapped: read when they are used, and given back behind it.

    tensors = mapped_tensors(Path("model.safetensors"))
    network.norm.weight.copy_(tensors["model.norm.weight"])
    tensors.let_go()                       # what was read is in memory no longer

A model is loaded by way of this, so that the file and the network that is made of it never lie in
memory together.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

NUMBERS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The number types of safetensors that models have."""


class MappedTensors(dict[str, Tensor]):
    """Tensors that lie in a file, which is mapped; their pages come when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], maps: Sequence[mmap.mmap] = ()) -> None:
        super().__init__(tensors)
        self.maps = list(maps)

    def let_go(self) -> None:
        """Give back the memory of all pages that were read. They come again when they are asked
        for, so that the whole file need not be in memory beside what is made of it."""
        for one in self.maps:
            one.madvise(mmap.MADV_DONTNEED)


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, not yet read. Where a number type is none of NUMBERS, or
    the system maps otherwise, they are read."""
    with safe_open(path, framework="pt") as file:  # which checks the table of contents
        names = set(file.keys())
    with open(path, "rb") as stored:
        begin = 8 + int.from_bytes(stored.read(8), "little")
        table = json.loads(stored.read(begin - 8))
        table.pop("__metadata__", None)
        types = {entry["dtype"] for entry in table.values()}
        if set(table) != names or not types <= NUMBERS.keys() or not hasattr(mmap, "MADV_DONTNEED"):
            return load_file(path)
        whole = mmap.mmap(stored.fileno(), 0, access=mmap.ACCESS_COPY)
    found: dict[str, Tensor] = {}
    for name, entry in table.items():
        number, shape = NUMBERS[entry["dtype"]], entry["shape"]
        start, count = begin + entry["data_offsets"][0], math.prod(shape)
        found[name] = (
            torch.frombuffer(whole, dtype=number, count=count, offset=start).view(shape)
            if count
            else torch.empty(shape, dtype=number)
        )
    return MappedTensors(found, [whole])
