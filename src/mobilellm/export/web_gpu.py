"""A folder whose page runs the model by transformers.js: on the GPU where the browser has WebGPU,
else by WebAssembly.

    notes = save_folder(Path("demo"), model)         # for `mobilellm serve`, or any other server

A browser reads the engine and the ONNX file beside the page, and so needs a server. Layers that are
applied several times are stored once.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from mobilellm.export.npm_client import read_pins
from mobilellm.export.npm_packages import package_files
from mobilellm.export.onnx_folder import FILES, FOLDER
from mobilellm.export.onnx_folder import write as write_onnx
from mobilellm.export.web_page import Engine, facts_of, write_page
from mobilellm.interop.writer import ModelToWrite

TRANSFORMERS, RUNTIME = "@huggingface/transformers", "onnxruntime-web"
SCRIPT = "dist/transformers.min.js"
BINARY = "dist/ort-wasm-simd-threaded.asyncify"
MODEL = "model"
DTYPES = {"INT4": "q4", "INT8": "int8", "F32": "fp32"}
"""What transformers.js calls the number types."""
MICROSOFT = "Copyright (c) Microsoft Corporation. Licensed under the MIT License."
ON_GPU = ("INT4", "F32")
"""Those that WebGPU computes: it has no product for 8-bit activations."""


def save_folder(path: Path, model: ModelToWrite) -> list[str]:
    """Fill an empty folder with the page, the engine's files and the ONNX folder of the model.

    Returns a line for each thing that is not as asked. `UserError` when the engine cannot be had,
    for a model without a tokenizer, and for one that the operators cannot say.
    """
    notes: list[str] = []
    facts = facts_of(model, notes)
    facts |= {
        "dtype": DTYPES[model.number_type],
        "gpu": model.number_type in ON_GPU,
        "ends": end_tokens(model, facts),
    }
    files = engine_files()
    (path / MODEL).mkdir()
    notes += write_onnx(path / MODEL, model)
    (path / "engine").mkdir()
    for name, data in files.items():
        (path / "engine" / name).write_bytes(data)
    written = path / MODEL / FOLDER / FILES[model.number_type]
    write_page(path / "index.html", model, facts, written, engine(), None)
    notes.append("a folder for a server: mobilellm serve FOLDER")
    return notes


def end_tokens(model: ModelToWrite, facts: dict[str, Any]) -> list[int]:
    """The tokens that end an answer: the model's own, and the one that a turn of its ends with."""
    own = model.network.config.end_tokens
    after = facts["turns"]["next"][:1] if facts["turns"] else []
    return sorted({*own, *(piece for piece in after if isinstance(piece, int))})


@functools.cache
def engine_files() -> dict[str, bytes]:
    """The engine's files by their names in the folder. `UserError` when they cannot be had."""
    script = package_files(TRANSFORMERS, SCRIPT)
    binary = package_files(RUNTIME, f"{BINARY}.mjs", f"{BINARY}.wasm")
    return {Path(name).name: data for name, data in (script | binary).items()}


def engine() -> Engine:
    """What the page says of its engine."""
    pins = read_pins()
    name = f"transformers.js {pins[TRANSFORMERS].version}"
    runtime = f"onnxruntime-web {pins[RUNTIME].version}"
    licence = package_files(TRANSFORMERS, "LICENSE")["LICENSE"].decode()
    return Engine(
        f"{name} on {runtime}",
        "engine_onnxruntime.js",
        ((f"{name}, Apache-2.0", licence), (f"{runtime}, MIT", MICROSOFT)),
        own_files=True,
    )
