"""Weights in a pickle, as torch.save writes them: tensors, and nothing that could be more.

    named = read_pickle(Path("pytorch_model.bin"))

A pickle is a program. Before torch's restricted unpickler runs it, its instructions are read
without being obeyed: it may name nothing but what a table of plain tensors needs. The archive
around it may hold no more than the file has bytes (torch.save does not compress), and no tensor may
be larger than what is stored of it: a view with a stride of 0 shows one number as a terabyte.
"""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mobilellm.errors import UserError, first_line

NUMBERS = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}Storage" for name in NUMBERS),
}
"""What a pickle may name: all that torch.save writes for a table of tensors."""
# Instructions that name or make objects in other ways than GLOBAL; torch.save uses none of them.
OTHER_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
MAX_PICKLE = 4 << 20  # bytes of the instructions; those of 1,000 tensors take 150,000
MAX_RECORDS = 1 << 17  # files in the archive, one a tensor
OLD_PARTS = 5  # pickles one after another in the format before archives
HINT = "ask for safetensors"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file. `UserError` when it is damaged, or holds anything but plain
    tensors."""
    damaged = "the file is damaged or not what its name says: fetch it again"
    try:
        for stream in _pickles(path):
            _look(stream, path)
        values = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, and is not opened", hint=HINT) from None
    except Exception as error:  # whatever damage makes torch raise
        raise UserError(
            f"{path}: cannot be read as weights ({first_line(error)})", hint=damaged
        ) from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"{path}: not a table of tensors", hint=damaged)
    for name, value in values.items():
        fault = _fault(value)
        if fault:
            raise UserError(f"{path}: {name[:200]!r} is {fault}", hint=HINT)
    return {name: value.detach() for name, value in values.items()}


def _fault(value: Any) -> str:
    """Why a value is no plain tensor whose numbers all lie in the file; empty where it is one."""
    if not isinstance(value, Tensor):
        return f"no tensor ({type(value).__name__})"
    if value.device.type != "cpu":
        return f"a tensor without numbers ({value.device.type})"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "a sparse, quantized or nested tensor"
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        return "larger than what is stored of it"
    return ""


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """The pickles of a file, each at its beginning. `UserError` for an archive that holds more than
    the file has bytes."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(OLD_PARTS):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if (
            len(records) > MAX_RECORDS
            or any(record.compress_type != zipfile.ZIP_STORED for record in records)
            or sum(record.file_size for record in records) > size
        ):
            raise UserError(f"{path}: unpacks to more than the file holds", hint=HINT)
        for record in records:
            if record.filename.rpartition("/")[2] == "data.pkl":
                with archive.open(record) as file:
                    yield file


def _look(stream: IO[bytes], path: Path) -> None:
    """Read one pickle's instructions without obeying them. `UserError` for what it may not name."""
    begin = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        known = argument in ALLOWED if opcode.name == "GLOBAL" else opcode.name not in OTHER_OPCODES
        if not known:
            name = str(argument or opcode.name)[:80]
            raise UserError(
                f"{path}: holds more than tensors, and is not opened (it names {name!r})", hint=HINT
            )
        if stream.tell() - begin > MAX_PICKLE:
            raise UserError(f"{path}: more than {MAX_PICKLE} bytes of instructions", hint=HINT)
