"""An ONNX graph put together node by node, and the file that it is written to.

    graph = Graph()
    weight = graph.tensor("weight", (2, 3), np.float32, lambda: array)
    y = graph.node("MatMul", ["x", weight], "y", name="/product")
    graph.write(path, inputs=[("x", np.float32, ["rows", 2])], outputs=[("y", np.float32, ...)])

Tensors are made when they are written, one at a time: a file of any size takes the memory of its
largest tensor. protobuf allows no message above 2 GiB; what is larger keeps its tensors in a second
file, `NAME.onnx_data`, where every runtime looks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mobilellm.errors import UserError
from mobilellm.version import __version__

OPSET, CONTRIB_OPSET, IR_VERSION = 20, 1, 10
CONTRIB = "com.microsoft"
"""The domain of onnxruntime's own operators."""
MAX_MESSAGE = (1 << 31) - (1 << 20)
"""Bytes of a file that keeps its tensors itself: protobuf's limit, less room for the nodes."""
ALIGNMENT = 4096  # of a tensor in a data file: runtimes map pages
MIN_EXTERNAL = 1024  # bytes; smaller tensors stay in the .onnx file, which shape inference reads
# Field numbers of onnx.proto, each with the wire type of a message or bytes.
GRAPH_OF_MODEL, TENSOR_OF_GRAPH, RAW_OF_TENSOR = (
    (number << 3 | 2).to_bytes(1, "little") for number in (7, 5, 9)
)

Shape = Sequence["int | str"]
Port = tuple[str, Any, Shape]
"""Name, numpy type and shape of an input or output; a name in a shape is any number."""


def onnx_package() -> Any:
    """The package `onnx`. `UserError` when it is not installed."""
    try:
        import onnx
    except ImportError:
        raise UserError(
            "writing ONNX needs the package onnx",
            hint="pip install 'mobilellm[onnx]' (onnx and onnxruntime, 110 MB on disk)",
        ) from None
    return onnx


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> np.ndarray:
        """Its numbers, in the order of the file."""
        # ascontiguousarray would turn a shape of () into (1,).
        array = np.asarray(self.make(), order="C")
        if array.shape != self.shape or array.dtype != self.dtype:
            raise AssertionError(
                f"{self.name}: {array.dtype}{array.shape} was made, {self.dtype}{self.shape} said"
            )
        return array


class Graph:
    """Nodes and tensors in the order in which they were added."""

    def __init__(self) -> None:
        """`UserError` without the package onnx."""
        self.onnx = onnx_package()
        self.nodes: list[Any] = []
        self.constants: dict[str, Constant] = {}

    def tensor(
        self, name: str, shape: Sequence[int], dtype: Any, make: Callable[[], np.ndarray]
    ) -> str:
        """Add a tensor, once under each name, and return the name; `make` is called on writing."""
        if name not in self.constants:
            self.constants[name] = Constant(
                name=name, shape=tuple(shape), dtype=np.dtype(dtype), make=make
            )
        return name

    def number(self, value: Any, dtype: Any) -> str:
        """A small constant: a number, or a list of some."""
        array = np.array(value, dtype)
        name = f"{array.dtype.name}_{'_'.join(map(str, array.ravel().tolist()))}_{array.ndim}d"
        return self.tensor(name, array.shape, array.dtype, lambda: array)

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, called after its first output, and return that output's name.

        An empty name stands for an input or output that is left out.
        """
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(
            self.onnx.helper.make_node(
                kind, list(inputs), names, name=names[0], domain=domain, **attributes
            )
        )
        return names[0]

    def cast(self, x: str, dtype: Any, output: str) -> str:
        """x in another number type."""
        return self.node("Cast", [x], output, to=self._type(dtype))

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(constant.nbytes for constant in self.constants.values())

    def write(
        self,
        path: Path,
        inputs: Iterable[Port],
        outputs: Iterable[Port],
        metadata: dict[str, str] | None = None,
        max_message: int = MAX_MESSAGE,
    ) -> list[Path]:
        """Write the file, and beside it `NAME.onnx_data` where it would exceed `max_message` bytes.

        Returns what was written. `metadata` are the model's properties. Missing space on the disk
        is an `OSError`, as from every write.
        """
        helper, data = self.onnx.helper, path.with_name(path.name + "_data")
        external = self.nbytes() > max_message
        offsets: dict[str, int] = {}
        if external:
            with open(data, "wb") as file:
                for constant in self.constants.values():
                    if constant.nbytes >= MIN_EXTERNAL:
                        file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                        offsets[constant.name] = file.tell()
                        file.write(constant.array().data)
        graph = helper.make_graph(
            self.nodes,
            "mobilellm",
            *([self._port(*p) for p in ports] for ports in (inputs, outputs)),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        empty = helper.make_graph([], "mobilellm", [], [])
        model = helper.make_model(
            empty,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="mobilellm",
            producer_version=__version__,
        )
        model.ClearField("graph")
        helper.set_model_props(model, metadata or {})
        # A message is the concatenation of its fields, in any order, so that the tensors can follow
        # the nodes one by one.
        body = graph.SerializeToString()
        heads = {c.name: self._head(c, offsets, data.name) for c in self.constants.values()}
        sizes = {
            name: len(head) + (0 if name in offsets else self.constants[name].nbytes)
            for name, head in heads.items()
        }
        total = len(body) + sum(1 + len(_varint(size)) + size for size in sizes.values())
        with open(path, "wb") as file:
            file.write(model.SerializeToString())
            file.write(GRAPH_OF_MODEL + _varint(total))
            file.write(body)
            for name, head in heads.items():
                file.write(TENSOR_OF_GRAPH + _varint(sizes[name]))
                file.write(head)
                if name not in offsets:
                    _write(file, self.constants[name].array())
        return [path, data] if external else [path]

    def _head(self, constant: Constant, offsets: dict[str, int], data: str) -> bytes:
        """A TensorProto up to its numbers, which follow it or lie in the file `data`."""
        tensor = self.onnx.TensorProto(
            name=constant.name, dims=constant.shape, data_type=self._type(constant.dtype)
        )
        if constant.name in offsets:
            tensor.data_location = self.onnx.TensorProto.EXTERNAL
            said = {
                "location": data,
                "offset": offsets[constant.name],
                "length": constant.nbytes,
            }
            for key, value in said.items():
                tensor.external_data.add(key=key, value=str(value))
            return bytes(tensor.SerializeToString())
        return bytes(tensor.SerializeToString()) + RAW_OF_TENSOR + _varint(constant.nbytes)

    def _port(self, name: str, dtype: Any, shape: Shape) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, self._type(dtype), list(shape))

    def _type(self, dtype: Any) -> int:
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _write(file: IO[bytes], array: np.ndarray) -> None:
    file.write(array.reshape(-1).view(np.uint8).data)


def _varint(number: int) -> bytes:
    """A number as protobuf writes lengths: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
