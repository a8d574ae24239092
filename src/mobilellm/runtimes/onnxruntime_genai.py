"""onnxruntime-genai as a runtime: folders with a genai_config.json.

    with open_session(Path("folder"), "onnxruntime-genai", context=1024, threads=2) as session:
        logits = session.feed([1, 2, 3])

It runs the file that genai_config.json names, and takes memory for the whole context at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.errors import UserError, first_line
from mobilellm.files import read_json
from mobilellm.interop.huggingface import read_tokenizer
from mobilellm.runtimes.session import Runtime, check_ids

SETTINGS = "genai_config.json"
MAX_SETTINGS = 1 << 20  # bytes


class GenaiSession:
    """A folder in onnxruntime-genai."""

    def __init__(self, path: Path, context: int | None = None, threads: int | None = None) -> None:
        """`UserError` with onnxruntime-genai's own words when it refuses the folder."""
        RUNTIME.require()
        import onnxruntime_genai as genai

        where = path / SETTINGS
        said = read_json(where, limit=MAX_SETTINGS)
        try:
            model = said["model"]
            longest, self.vocab_size = int(model["context_length"]), int(model["vocab_size"])
            ends = model["eos_token_id"]
            self.end_tokens = tuple(ends) if isinstance(ends, list) else (int(ends),)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: damaged", hint="convert the model again") from None
        if context is not None and not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the file's {longest} positions")
        self.path, self.context = path, context or longest
        options = {"intra_op_num_threads": threads or os.cpu_count() or 1}
        try:
            config = genai.Config(os.fspath(path))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.model: Any = genai.Model(config)
            self.params: Any = genai.GeneratorParams(self.model)
            self.params.set_search_options(max_length=self.context, do_sample=False)
            self.generator: Any = genai.Generator(self.model, self.params)
        except Exception as error:  # the library's own kinds share no base but this one
            raise UserError(
                f"{path}: refused by onnxruntime-genai ({first_line(error)})",
                hint="convert the model again, or update onnxruntime-genai",
            ) from None
        self.held = 0

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        check_ids(ids, self.held, self)
        self.held += len(ids)  # before it is so: what breaks off may have appended them
        try:
            self.generator.append_tokens(np.asarray(ids, np.int32))
            logits = self.generator.get_logits()
        except Exception as error:  # the library's own kinds share no base but this one
            raise UserError(
                f"{self.path}: onnxruntime-genai stopped ({first_line(error)})"
            ) from None
        return np.array(logits.reshape(-1, self.vocab_size)[-1], np.float32)

    def reset(self) -> None:
        """As `Session` says."""
        self.rewind(0)

    def rewind(self, length: int) -> int:
        """As `Session` says."""
        if self.held > length:
            self.generator.rewind_to(length)
            self.held = length
        return self.held

    def close(self) -> None:
        """As `Session` says."""
        self.generator = self.params = self.model = None


def file_of(path: Path) -> Path:
    """The file that the folder's settings name."""
    where = path / SETTINGS
    try:
        name = read_json(where, limit=MAX_SETTINGS)["model"]["decoder"]["filename"]
        inside = path / name
    except (KeyError, TypeError):
        raise UserError(f"{where}: names no file", hint="convert the model again") from None
    if not inside.resolve().is_relative_to(path.resolve()) or not inside.is_file():
        raise UserError(f"{where}: no file {name!r} in the folder", hint="convert the model again")
    return inside


RUNTIME = Runtime(
    name="onnxruntime-genai",
    what="folders of convert --to onnx",
    package="onnxruntime_genai",
    extra="genai",
    recognizes=lambda path: (path / SETTINGS).is_file(),
    open=GenaiSession,
    read_tokenizer=read_tokenizer,
    file_of=file_of,
)
