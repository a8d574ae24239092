"""onnxruntime as a runtime: folders and files that `convert --to onnx` wrote.

    with open_session(Path("folder"), "onnxruntime", context=1024, threads=2) as session:
        logits = session.feed([1, 2, 3])

Of a folder the best file for a processor is taken: 4 bits, else 8 bits, else float32; a single
.onnx file can be given instead. Keys and values stay where they are: the same memory is bound as
input and output, and attention writes the new positions into it. It grows by doubling up to the
context, so that a short text takes little.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.errors import UserError, first_line
from mobilellm.export.onnx_folder import FILES, FOLDER
from mobilellm.interop.huggingface import read_tokenizer
from mobilellm.runtimes.session import Runtime, check_ids
from mobilellm.tokenizer.tokenizer import Tokenizer

FIRST_ROOM = 256
"""Positions that memory is taken for at first."""
MAX_CONTEXT, MAX_VOCABULARY, MAX_CACHE = 1 << 20, 1 << 20, 1 << 20
"""Bounds on what a file may ask for; the last in numbers that a token leaves in the cache."""
ERRORS_ONLY = 3  # log level: warnings are of no use to who only runs a file


class OnnxSession:
    """A file in onnxruntime."""

    def __init__(self, path: Path, context: int | None = None, threads: int | None = None) -> None:
        """`UserError` with onnxruntime's own words when it refuses the file, and for a file of
        another make."""
        self.path = file_of(path)
        self.session = _open(self.path, threads)
        self._read_ports()
        said = self.session.get_modelmeta().custom_metadata_map
        try:
            longest, ends = int(said["context"]), json.loads(said["end_tokens"])
            known = isinstance(ends, list) and all(type(i) is int for i in ends)
            if not 1 <= longest <= MAX_CONTEXT or not known:
                raise ValueError
        except (KeyError, ValueError, RecursionError):
            raise self._unknown("no context and end tokens in its properties") from None
        if context is not None and not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the file's {longest} positions")
        self.context, self.end_tokens = context or longest, tuple(ends)
        self.held, self.room = 0, 0
        self.caches: dict[str, np.ndarray] = {}
        self.logits = np.zeros((1, 1, self.vocab_size), np.float32)
        self.mask = np.ones((1, self.context), np.int64)
        self.binding = self.session.io_binding()
        self._grow(min(FIRST_ROOM, self.context))

    def _read_ports(self) -> None:
        """The vocabulary and the cache's shapes; `UserError` unless they are those of our files."""
        inputs = {port.name: port for port in self.session.get_inputs()}
        outputs = {port.name: port for port in self.session.get_outputs()}
        slots = [name for name in inputs if name.startswith("past_key_values.")]
        presents = [name.replace("past_key_values", "present", 1) for name in slots]
        if set(inputs) != {"input_ids", "attention_mask", *slots}:
            raise self._unknown("other inputs")
        if set(outputs) != {"logits", *presents} or not slots:
            raise self._unknown("other outputs")
        shape = outputs["logits"].shape
        self.past: dict[str, tuple[int, int]] = {}
        for name in slots:
            port = inputs[name]
            sizes = tuple(port.shape[1::2]) if len(port.shape) == 4 else ()
            if port.type != "tensor(float)" or not all(type(n) is int and n > 0 for n in sizes):
                raise self._unknown(f"{name} is {port.type}{port.shape}")
            self.past[name] = (sizes[0], sizes[1])
        width = sum(heads * head_dim for heads, head_dim in self.past.values())
        whole = len(shape) == 3 and shape[1] == 1 and type(shape[2]) is int
        if not whole or not 0 < shape[2] <= MAX_VOCABULARY or width > MAX_CACHE:
            raise self._unknown(f"logits of {shape}, {width} numbers a token in the cache")
        self.vocab_size = int(shape[2])

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: not a file of `mobilellm convert --to onnx` ({what})",
            hint="convert the model that it was made from",
        )

    def _grow(self, room: int) -> None:
        """Take memory for `room` positions, and keep what is held."""
        for name, (heads, head_dim) in self.past.items():
            array = np.zeros((1, heads, room, head_dim), np.float32)
            if self.held:
                array[:, :, : self.held] = self.caches[name][:, :, : self.held]
            self.caches[name] = array
        self.room = room
        binding = self.binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        for name, array in self.caches.items():
            present = name.replace("past_key_values", "present", 1)
            for bind, key in ((binding.bind_input, name), (binding.bind_output, present)):
                bind(key, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        logits = self.logits
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        check_ids(ids, self.held, self)
        total = self.held + len(ids)
        if total > self.room:
            self._grow(min(self.context, max(total, 2 * self.room)))
        tokens, mask = np.array([list(ids)], np.int64), self.mask[:, :total]
        for name, array in (("input_ids", tokens), ("attention_mask", mask)):
            self.binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # the library's own kinds share no base but this one
            raise UserError(f"{self.path}: onnxruntime stopped ({first_line(error)})") from None
        self.held = total
        return self.logits[0, 0].copy()

    def reset(self) -> None:
        """As `Session` says."""
        self.held = 0

    def rewind(self, length: int) -> int:
        """As `Session` says."""
        self.held = min(length, self.held)
        return self.held

    def close(self) -> None:
        """As `Session` says."""
        self.binding = self.session = None
        self.caches.clear()


def _open(path: Path, threads: int | None) -> Any:
    RUNTIME.require()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the library's own kinds share no base but this one
        raise UserError(
            f"{path}: refused by onnxruntime ({first_line(error)})",
            hint="convert the model again, or update onnxruntime",
        ) from None


def _names(path: Path) -> list[str]:
    """The .onnx files of a folder, the best for a processor first."""
    inside = path / FOLDER
    found = sorted(file.name for file in inside.glob("*.onnx")) if inside.is_dir() else []
    known = [name for name in FILES.values() if name in found]
    return known + [name for name in found if name not in known]


def file_of(path: Path) -> Path:
    """The file that is run for `path`: the best one of a folder."""
    if not path.is_dir():
        return path
    names = _names(path)
    if not names:
        raise UserError(f"{path}: holds no {FOLDER}/*.onnx", hint="is the folder whole?")
    return path / FOLDER / names[0]


def recognizes(path: Path) -> bool:
    """Whether a path is an .onnx file, or a folder with some."""
    return bool(_names(path)) if path.is_dir() else path.suffix == ".onnx"


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or of the folder that a file lies in."""
    if path.is_dir():
        return read_tokenizer(path)
    parent = path.absolute().parent
    return read_tokenizer(parent.parent if parent.name == FOLDER else parent)


RUNTIME = Runtime(
    name="onnxruntime",
    what="folders and .onnx files of convert --to onnx",
    package="onnxruntime",
    extra="onnx",
    recognizes=recognizes,
    open=OnnxSession,
    read_tokenizer=tokenizer_of,
    file_of=file_of,
)
