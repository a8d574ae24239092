"""llama.cpp as a runtime: GGUF files of any architecture that it knows.

Its C API comes from the library within the package `xllamacpp`, which exports it. Logits are copied
from llama.cpp's own memory, so a token costs what it costs there.

    with open_session(Path("model.gguf"), "llama.cpp", context=1024, threads=2) as session:
        logits = session.feed([1, 2, 3])

Settings are llama.cpp's own: keys and values in F16, flash attention where it takes it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.errors import UserError
from mobilellm.interop.gguf_reader import end_tokens, header_of, read_tokenizer, recognizes
from mobilellm.runtimes.session import Runtime, check_ids

PACKAGE = "xllamacpp"
ERROR_LEVEL = 4
FULL = 1
"""What `llama_decode` returns when the cache has no room."""


class Struct(ctypes.Structure):
    """A structure of llama.cpp that is passed by value, of more bytes than any of them has.

    The functions that make one fill the bytes that they know, and those that take one read the same
    bytes, so that no layout is repeated here but the first field of the context's settings.
    """

    _fields_ = (("words", ctypes.c_uint64 * 64),)


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
# Result and arguments of every function that is called.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, LogCallback, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (Struct,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Struct),
    "llama_model_free": (None, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_tokenize": (
        c_int32,
        c_void_p,
        c_char_p,
        c_int32,
        POINTER(c_int32),
        c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ),
    "llama_context_default_params": (Struct,),
    "llama_init_from_model": (c_void_p, c_void_p, Struct),
    "llama_free": (None, c_void_p),
    "llama_n_ctx": (c_uint32, c_void_p),
    "llama_n_batch": (c_uint32, c_void_p),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_batch_get_one": (Struct, c_void_p, c_int32),
    "llama_decode": (c_int32, c_void_p, Struct),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, ctypes.c_bool),
    "llama_memory_seq_rm": (ctypes.c_bool, c_void_p, c_int32, c_int32, c_int32),
}


class Library:
    """llama.cpp's C API: its functions by name, and what it complained of last."""

    def __init__(self, path: str) -> None:
        """`UserError` when the library at `path` does not export the API."""
        library = ctypes.CDLL(path)
        self.complaints: list[str] = []
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise UserError(
                    f"{path}: does not export {name} of llama.cpp's C API",
                    hint=f"install a wheel of {PACKAGE} from PyPI: pip install 'mobilellm[llama]'",
                )
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("llama_"), function)
        self._callback = LogCallback(self._log)  # as long as the library may call it
        self.log_set(self._callback, None)
        self.backend_init()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)  # the functions are set by name: for the type checker

    def _log(self, level: int, text: bytes | None, _: object) -> None:
        if level == ERROR_LEVEL and text:
            self.complaints.append(text.decode(errors="replace").strip())

    def listen(self) -> None:
        """Take llama.cpp's messages from here on; a server of the package takes them for itself."""
        self.complaints.clear()
        self.log_set(self._callback, None)

    def failed(self, path: Path, hint: str) -> UserError:
        """The error with the first of the complaints, which names the cause."""
        said = self.complaints[0] if self.complaints else "no reason given"
        return UserError(f"{path}: refused by llama.cpp ({said[:200]})", hint=hint)


@functools.cache
def library() -> Library:
    """The API, loaded once. `UserError` when the package is not installed, or without it."""
    RUNTIME.require()
    found = importlib.util.find_spec(f"{PACKAGE}.{PACKAGE}")
    if found is None or found.origin is None:
        raise UserError(f"{PACKAGE}: has no library in it", hint="pip install 'mobilellm[llama]'")
    return Library(found.origin)


class LlamaSession:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, context: int | None = None, threads: int | None = None) -> None:
        """`UserError` with llama.cpp's own words when it refuses the file."""
        header = header_of(path)
        self.api = api = library()
        api.listen()
        self.context_handle: int | None = None
        self.model: int | None = api.model_load_from_file(
            os.fsencode(path), api.model_default_params()
        )
        if self.model is None:
            raise api.failed(path, "convert the model again, or update xllamacpp")
        try:
            longest = api.model_n_ctx_train(self.model)
            if context is not None and not 1 <= context <= longest:
                raise UserError(
                    f"context {context}: must be from 1 to the model's {longest} positions"
                )
            self.context = context or longest
            settings = api.context_default_params()
            settings.words[0] = settings.words[0] >> 32 << 32 | self.context  # its length: 32 bits
            self.context_handle = api.init_from_model(self.model, settings)
            if self.context_handle is None or api.n_ctx(self.context_handle) < self.context:
                raise api.failed(path, "give a shorter context: its memory must fit")
        except UserError:
            self.close()
            raise
        threads = threads or os.cpu_count() or 1
        api.set_n_threads(self.context_handle, threads, threads)
        self.at_once: int = api.n_batch(self.context_handle)
        self.vocab_size: int = api.vocab_n_tokens(api.model_get_vocab(self.model))
        self.end_tokens = tuple(end_tokens(header.keys, self.vocab_size))
        self.held = 0

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        """As `Session` says."""
        check_ids(ids, self.held, self)
        tokens = np.asarray(ids, dtype=np.int32)
        for start in range(0, len(tokens), self.at_once):
            part = tokens[start : start + self.at_once]
            batch = self.api.batch_get_one(part.ctypes.data, len(part))
            code = self.api.decode(self.context_handle, batch)
            if code:
                why = "no room in its cache" if code == FULL else f"code {code}"
                raise UserError(f"llama.cpp could not go on after {self.held} tokens: {why}")
            self.held += len(part)
        logits = self.api.get_logits_ith(self.context_handle, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,)).copy()

    def reset(self) -> None:
        """As `Session` says."""
        self.api.memory_clear(self.api.get_memory(self.context_handle), True)
        self.held = 0

    def rewind(self, length: int) -> int:
        """As `Session` says. llama.cpp keeps every position of a sliding window, unless told not
        to, and only a recurrent model's memory cannot be cut."""
        if length < self.held:
            memory = self.api.get_memory(self.context_handle)
            if length and self.api.memory_seq_rm(memory, 0, length, -1):
                self.held = length
            else:
                self.reset()
        return self.held

    def close(self) -> None:
        """As `Session` says."""
        if self.context_handle is not None:
            self.api.free(self.context_handle)
        if self.model is not None:
            self.api.model_free(self.model)
        self.context_handle = self.model = None


RUNTIME = Runtime(
    name="llama.cpp",
    what="GGUF files",
    package=PACKAGE,
    extra="llama",
    recognizes=recognizes,
    open=LlamaSession,
    read_tokenizer=read_tokenizer,
    keeps_repeats=False,
)
