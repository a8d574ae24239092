"""A page that runs the model in a browser: one file, or a folder for what is too large for one.

    notes = save_page(Path("demo.html"), model)      # opens from file://, from a phone's downloads

One file holds everything: llama.cpp in WebAssembly, the model as GGUF, the page. Its size is
bounded, since a browser keeps a file that it opens as text several times (docs/log.md has what was
tried).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.export.web_page import engine_parts, facts_of, write_page
from mobilellm.interop.gguf_writer import save as save_gguf
from mobilellm.interop.writer import ModelToWrite

MAX_PAGE_BYTES = 400_000_000


def save_page(path: Path, model: ModelToWrite) -> list[str]:
    """Write one self-contained file; returns a line for each thing that is not as asked.

    `UserError` when the engine cannot be had, for a model without a tokenizer, for one that GGUF
    cannot say, and for one that is too large.
    """
    notes: list[str] = []
    facts = facts_of(model, notes)
    parts, licence = engine_parts()
    file = path.with_name("model.gguf")
    try:
        notes += save_gguf(file, dataclasses.replace(model, context=None))
        size = file.stat().st_size * 4 // 3
        if size > MAX_PAGE_BYTES:
            raise UserError(
                f"{path.name}: {size / 1e6:,.0f} MB of model in a page, the limit is "
                f"{MAX_PAGE_BYTES / 1e6:,.0f}",
                hint="choose a smaller number type, --precision Q4_0, or --to onnx or gguf",
            )
        write_page(path, model, facts, file, parts, licence)
    finally:
        file.unlink(missing_ok=True)
    notes.append(f"{path.stat().st_size / 1e6:.1f} MB, opens without a server or a network")
    return notes
