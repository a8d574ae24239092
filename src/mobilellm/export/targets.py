"""Everything that `mobilellm convert --to` can write: weights for others, and programs.

    TARGETS["gguf"].what

A target is an entry of the same kind as those of interop/writers.py; its `write` imports what it
needs when it is called, so that the command line takes its choices from here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mobilellm.interop.writer import ModelToWrite, Writer
from mobilellm.interop.writers import WRITERS


def _write_onnx(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.onnx_folder import write

    return write(path, model)


def _write_modelfile(out: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.modelfile import write_beside

    return write_beside(out, model)


def _write_web_page(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.web import save_page

    return save_page(path, model)


def _write_web_folder(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.web import save_folder

    return save_folder(path, model)


def _write_webgpu_folder(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.web_gpu import save_folder

    return save_folder(path, model)


def _model_within_web_page(path: Path) -> Path:
    from mobilellm.export.web_page import model_within

    return model_within(path)


INTEGERS = {"int4": "INT4", "8da4w": "INT4", "int8": "INT8", "w8a8": "INT8"}
"""How programs name the integers of a scheme."""

_WEB_FOLDER = Writer(
    what="a page that writes in a browser, without a network; shared layers unrolled",
    suffix="",
    keeps_repeats=False,
    number_types=("Q8_0", "Q4_0", "F16", "F32"),
    of_scheme=WRITERS["gguf"].of_scheme,  # which lies in it
    write=_write_web_folder,
    takes_context=True,
    usual_context=2048,
    cache_bytes=2,
    model_within=lambda folder: folder / "model.gguf",
)


def _write_executorch(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.export.executorch import write

    return write(path, model)


PROGRAMS: dict[str, Writer] = {
    "executorch": Writer(
        what="a folder with a program for ExecuTorch's apps on Android and iOS",
        suffix="",
        keeps_repeats=True,
        number_types=("F32", "INT4", "INT8"),
        of_scheme=INTEGERS,
        write=_write_executorch,
        takes_context=True,
        usual_context=2048,
        runtime="executorch",
    ),
    "onnx": Writer(
        what="a folder for onnxruntime, onnxruntime-genai and transformers.js",
        suffix="",
        keeps_repeats=True,
        number_types=("ALL", "F32", "INT4", "INT8"),
        write=_write_onnx,
        takes_context=True,
        runtime="onnxruntime",
    ),
    "web": dataclasses.replace(
        _WEB_FOLDER,
        suffix=".html",
        write=_write_web_page,
        model_within=_model_within_web_page,
        as_folder=_WEB_FOLDER,
    ),
    "webgpu": Writer(
        what="a folder whose page runs the model on the GPU where a browser has WebGPU",
        suffix="",
        keeps_repeats=True,
        number_types=("INT4", "INT8", "F32"),
        of_scheme=INTEGERS,
        write=_write_webgpu_folder,
        takes_context=True,
        usual_context=2048,
        runtime="onnxruntime",
        model_within=lambda folder: folder / "model",
    ),
}
TARGETS: dict[str, Writer] = WRITERS | PROGRAMS
TARGETS["gguf"] = dataclasses.replace(WRITERS["gguf"], write_beside=_write_modelfile)
NUMBER_TYPES = tuple(dict.fromkeys(t for target in TARGETS.values() for t in target.number_types))
