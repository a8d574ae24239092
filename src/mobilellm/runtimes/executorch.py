"""ExecuTorch as a runtime: folders and programs that `convert --to executorch` wrote.

    with open_session(Path("folder"), "executorch") as session:
        logits = session.feed([1, 2, 3])

The program's cache lies in the program; a position says where tokens go, so that a sequence begins
anew by starting at 0. The package has no setting for threads: it takes those of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.errors import UserError, first_line
from mobilellm.interop.huggingface import read_tokenizer
from mobilellm.runtimes.session import Runtime, check_ids
from mobilellm.tokenizer.tokenizer import Tokenizer

SUFFIX = ".pte"
MAGIC = b"ET"  # of a program, after the offset of its root table
MAX_CONTEXT, MAX_VOCABULARY = 1 << 20, 1 << 20


class ExecutorchSession:
    """A program in ExecuTorch."""

    def __init__(self, path: Path, context: int | None = None, threads: int | None = None) -> None:
        """`UserError` with ExecuTorch's own words when it refuses the file, and for a file of
        another make."""
        RUNTIME.require()
        self.path = file_of(path)
        check_header(self.path)
        self.program: Any
        self.method: Any
        self.program, self.method = _load(self.path)
        longest = self._constant("get_max_context_len", MAX_CONTEXT)
        self.vocab_size = self._constant("get_vocab_size", MAX_VOCABULARY)
        self.chunk = self._constant("get_max_seq_len", MAX_CONTEXT)
        if context is not None and not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the file's {longest} positions")
        self.context = context or longest
        self.end_tokens = tuple(int(token) for token in self._values("get_eos_ids"))
        self.held = 0

    def _values(self, name: str) -> list[Any]:
        """What a method without inputs returns."""
        if name not in self.program.method_names:
            return []
        return list(self.program.load_method(name).execute([]))

    def _constant(self, name: str, most: int) -> int:
        values = self._values(name)
        if len(values) != 1 or type(values[0]) is not int or not 1 <= values[0] <= most:
            raise UserError(
                f"{self.path}: not a program of `mobilellm convert --to executorch` "
                f"({name} is {str(values)[:60]})",
                hint="convert the model that it was made from",
            )
        return values[0]

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        import torch

        check_ids(ids, self.held, self)
        found: Any = None
        for start in range(0, len(ids), self.chunk):
            part = list(ids[start : start + self.chunk])
            try:
                (found,) = self.method.execute([torch.tensor([part]), torch.tensor([self.held])])
            except RuntimeError as error:
                raise UserError(f"{self.path}: ExecuTorch stopped ({first_line(error)})") from None
            self.held += len(part)
        logits: np.ndarray = found.reshape(-1)[-self.vocab_size :].float().numpy().copy()
        return logits

    def reset(self) -> None:
        """As `Session` says."""
        self.held = 0

    def rewind(self, length: int) -> int:
        """As `Session` says."""
        self.held = min(length, self.held)
        return self.held

    def close(self) -> None:
        """As `Session` says."""
        self.method = self.program = None


def _load(path: Path) -> tuple[Any, Any]:
    """The program and its method, with the operators that it asks for."""
    import executorch.extension.pybindings.portable_lib

    # isort: split
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime as Library
    from executorch.runtime import Verification

    try:
        program = Library.get().load_program(
            os.fspath(path), verification=Verification.InternalConsistency
        )
        return program, program.load_method("forward")
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: refused by ExecuTorch ({first_line(error)})",
            hint="convert the model again, with the ExecuTorch that is to run it",
        ) from None


def check_header(path: Path) -> None:
    """`UserError` for a file that is no program, before native code sees it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    root = int.from_bytes(head[:4], "little")
    if len(head) < 8 or head[4:6] != MAGIC or not 8 <= root < size:
        raise UserError(f"{path}: not an ExecuTorch program, or damaged")


def _programs(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{SUFFIX}"))


def file_of(path: Path) -> Path:
    """The program that is run for `path`: the one of a folder."""
    if not path.is_dir():
        return path
    found = _programs(path)
    if len(found) != 1:
        raise UserError(
            f"{path}: holds {len(found)} programs (*{SUFFIX})", hint="name the one to run"
        )
    return found[0]


def recognizes(path: Path) -> bool:
    """Whether a path is a program, or a folder with some."""
    return bool(_programs(path)) if path.is_dir() else path.suffix == SUFFIX


def tokenizer_of(path: Path) -> Tokenizer | None:
    """The tokenizer of a folder, or of the folder that a program lies in."""
    return read_tokenizer(path if path.is_dir() else path.absolute().parent)


RUNTIME = Runtime(
    name="executorch",
    what="folders and .pte programs of convert --to executorch",
    package="executorch",
    extra="executorch",
    recognizes=recognizes,
    open=ExecutorchSession,
    read_tokenizer=tokenizer_of,
    file_of=file_of,
    imports=(
        "executorch.extension.pybindings.portable_lib",
        "executorch.extension.llm.custom_ops.custom_ops",
        "executorch.kernels.quantized",
        "executorch.runtime",
    ),
)
