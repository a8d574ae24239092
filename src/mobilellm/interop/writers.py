"""The formats that a model can be written in, each described by its entry.

    WRITERS["gguf"].number_types       # ("F32", "F16", "BF16", "Q8_0", "Q4_0")
    WRITERS["gguf"].write(path, network, tokenizer, "Q8_0", origin)

A new format is one entry and the file that its `write` calls. The command line takes its choices
from here, so nothing heavy is imported before a model is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import Tokenizer

Write = Callable[["Path", "Network", "Tokenizer | None", str, "dict[str, Any]"], "list[str]"]


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A format that can be written."""

    what: str
    """What comes out, in a few words."""
    suffix: str
    """Of the file that is written; empty when it is a folder."""
    keeps_repeats: bool
    """Whether layers that are applied several times are stored once; else they are unrolled."""
    number_types: tuple[str, ...]
    """How matrices can be stored; the first is used when nothing is asked for."""
    write: Write
    """Takes path, network, tokenizer, number type and origin; returns a line for each thing that
    is not as asked. A folder exists already, a file does not. `UserError` for what the format
    cannot say."""


def _write_folder(
    path: Path,
    network: Network,
    tokenizer: Tokenizer | None,
    number_type: str,
    origin: dict[str, Any],
) -> list[str]:
    from mobilellm.interop.folder import save_checkpoint

    save_checkpoint(path, network, tokenizer, origin)
    return [] if tokenizer is not None else ["no tokenizer: the source has none"]


def _write_gguf(
    path: Path,
    network: Network,
    tokenizer: Tokenizer | None,
    number_type: str,
    origin: dict[str, Any],
) -> list[str]:
    from mobilellm.interop.gguf_writer import save

    return save(path, network, tokenizer, number_type, origin)


WRITERS: dict[str, Writer] = {
    "hf": Writer(
        what="a plain LlamaForCausalLM, shared layers unrolled",
        suffix="",
        keeps_repeats=False,
        number_types=("F32",),
        write=_write_folder,
    ),
    "gguf": Writer(
        what="a file for llama.cpp, shared layers unrolled",
        suffix=".gguf",
        keeps_repeats=False,
        # Blocks of 32 fit every MobileLLM width. K-quants need rows of 256 numbers.
        number_types=("F32", "F16", "BF16", "Q8_0", "Q4_0"),
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
NUMBER_TYPES = tuple(dict.fromkeys(t for writer in WRITERS.values() for t in writer.number_types))
