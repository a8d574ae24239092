"""llama.cpp's own reading of the tokenizer in a GGUF file.

    with llama_cpp_tokens(Path("model.gguf")) as encode: ...

`encode("Hello", parse_special=False)` gives ids then, nothing added. It is what users of the file
get, whatever our reader makes of the same keys.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mobilellm.runtimes.llama_cpp import library

Encode = Callable[..., list[int]]


@contextlib.contextmanager
def llama_cpp_tokens(path: Path) -> Iterator[Encode]:
    """A function from text to ids, as llama.cpp has them; it lasts as long as the block.

    It takes the text and `parse_special`, whether a special token that the text spells out is that
    token. `UserError` when llama.cpp refuses the file or is not installed.
    """
    api = library()
    api.listen()
    model = api.model_load_from_file(os.fsencode(path), api.model_default_params())
    if model is None:
        raise api.failed(path, "convert the model again, or update xllamacpp")
    vocabulary = api.model_get_vocab(model)

    def encode(text: str, *, parse_special: bool = False) -> list[int]:
        data = text.encode()
        room = len(data) + 16  # a token has a byte at least; a space may be put before each part
        while True:
            ids = (ctypes.c_int32 * room)()
            count = int(api.tokenize(vocabulary, data, len(data), ids, room, False, parse_special))
            if count >= 0:
                return list(ids[:count])
            room = -count  # what it needs

    try:
        yield encode
    finally:
        api.model_free(model)
