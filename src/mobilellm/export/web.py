"""A page that runs the model in a browser: one file, or a folder for what is too large for one.

    notes = save_page(Path("demo.html"), model)      # opens from file://, from a phone's downloads
    notes = save_folder(Path("demo"), model)         # for `mobilellm serve`, or any other server

One file holds everything: llama.cpp in WebAssembly, the model as GGUF, the page. Its size is
bounded, since a browser keeps a file that it opens as text several times (docs/log.md has what was
tried).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.export.web_page import engine_parts, facts_of, llama_cpp, write_page
from mobilellm.interop.gguf_writer import save as save_gguf
from mobilellm.interop.writer import ModelToWrite

MAX_PAGE_BYTES = 400_000_000
MODEL = "model.gguf"


def save_page(path: Path, model: ModelToWrite) -> list[str]:
    """Write one self-contained file; returns a line for each thing that is not as asked.

    `UserError` when the engine cannot be had, for a model without a tokenizer, for one that GGUF
    cannot say, and for one that is too large.
    """
    notes: list[str] = []
    facts = facts_of(model, notes)
    parts, licence = engine_parts()
    file = path.with_name(MODEL)
    try:
        notes += save_gguf(file, dataclasses.replace(model, context=None))
        size = file.stat().st_size * 4 // 3
        if size > MAX_PAGE_BYTES:
            raise UserError(
                f"{path.name}: {size / 1e6:,.0f} MB of model in a page, the limit is "
                f"{MAX_PAGE_BYTES / 1e6:,.0f}",
                hint="give a name without .html for a folder, or --precision Q4_0",
            )
        write_page(path, model, facts, file, llama_cpp(licence), parts)
    finally:
        file.unlink(missing_ok=True)
    notes.append(f"{path.stat().st_size / 1e6:.1f} MB, opens without a server or a network")
    return notes


def save_folder(path: Path, model: ModelToWrite) -> list[str]:
    """Fill an empty folder with the page, the engine's parts and the model, each a file.

    Returns notes and raises as `save_page`, but has no limit of size.
    """
    notes: list[str] = []
    facts = facts_of(model, notes)
    parts, licence = engine_parts()
    notes += save_gguf(path / MODEL, dataclasses.replace(model, context=None))
    (path / "engine").mkdir()
    for name, data in parts.items():
        (path / "engine" / f"{name}.gz").write_bytes(data)
    write_page(path / "index.html", model, facts, path / MODEL, llama_cpp(licence), None)
    notes.append("a folder for a server: mobilellm serve FOLDER")
    return notes
