"""The formats that a model can be written in, each described by its entry.

    WRITERS["gguf"].number_types       # ("F32", "F16", "BF16", "Q8_0", "Q4_0")

A new format is one entry and the file that its `write` calls. The command line takes its choices
from here, so nothing heavy is imported before a model is written.
"""

from __future__ import annotations

from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.interop.writer import ModelToWrite, Writer


def _write_folder(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.interop.folder import save_checkpoint

    save_checkpoint(
        path,
        model.network,
        model.tokenizer,
        model.origin,
        generation=model.generation,
        number_type=model.number_type,
        card=model.card,
    )
    if model.quantized is not None:
        model.quantized.save(path, model.network.config)
    return [] if model.tokenizer is not None else ["no tokenizer: the source has none"]


def _write_hf(path: Path, model: ModelToWrite) -> list[str]:
    if model.network.config.to_dict()["model_type"] == "mobilellm":
        raise UserError(
            "transformers' network with sliding windows and without qk_norm (cwm) divides "
            "hidden_size by num_attention_heads, which this network does not",
            hint="keep it with --to mobilellm",
        )
    return _write_folder(path, model)


def _write_gguf(path: Path, model: ModelToWrite) -> list[str]:
    from mobilellm.interop.gguf_writer import save

    return save(path, model)


WRITERS: dict[str, Writer] = {
    "hf": Writer(
        what="a plain LlamaForCausalLM, shared layers unrolled",
        suffix="",
        keeps_repeats=False,
        number_types=("F32", "BF16", "F16"),
        as_stored=True,
        write=_write_hf,
    ),
    "gguf": Writer(
        what="a file for llama.cpp, shared layers unrolled",
        suffix=".gguf",
        keeps_repeats=False,
        # Blocks of 32 fit every MobileLLM width. K-quants need rows of 256 numbers.
        number_types=("F32", "F16", "BF16", "Q8_0", "Q4_0"),
        of_scheme={"int4": "Q4_0", "8da4w": "Q4_0", "int8": "Q8_0", "w8a8": "Q8_0"},
        write=_write_gguf,
    ),
    "mobilellm": Writer(
        what="our own checkpoint, which keeps shared layers as they are",
        suffix="",
        keeps_repeats=True,
        number_types=("F32",),
        write=_write_folder,
    ),
}
