"""What a writer is given, and the entry by which a format that is written describes itself.

    model = ModelToWrite(network=network, tokenizer=tokenizer, number_type="Q8_0", origin={})
    WRITERS["gguf"].write(path, model)

Every writer imports this module; nothing here knows a format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilellm.cards.model_card import CardFacts
    from mobilellm.model.network import Network
    from mobilellm.quantize.quantized import Quantized
    from mobilellm.tokenizer.tokenizer import Tokenizer

Check = Callable[["Path", "Network", bool], str]


@dataclass(frozen=True, kw_only=True)
class ModelToWrite:
    """What a writer is given."""

    network: Network
    """Float32; its layer sharing is unrolled where the format does not keep it."""
    tokenizer: Tokenizer | None
    number_type: str
    """How matrices are to be stored: one of the writer's `number_types`."""
    origin: dict[str, Any]
    """Where the model came from, as it is to be recorded."""
    quantized: Quantized | None = None
    """What of the network lies on the grid; these integers and scales are to be written."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """How its makers sample from it, in generation_config.json's keys."""
    context: int | None = None
    """Positions that the result is to have room for; None where the format does not choose."""
    card: CardFacts | None = None
    """What the card of a folder says beside what is here."""
    check: Check | None = None
    """Runs a file that was just written by the writer's runtime, compares it with the network that
    it holds, and says how well it came out; True where all its numbers are float32. `UserError`
    when it is another network. None where nothing is to be run; who writes one file alone need not
    call it."""


Write = Callable[["Path", ModelToWrite], "list[str]"]


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
    """Takes the path and what is to be written; returns a line for each thing that is not as asked.
    A folder exists already, a file does not. `UserError` for what the format cannot say."""
    of_scheme: Mapping[str, str] = field(default_factory=dict)
    """Of a quantized model: the number type that holds its integers, by its scheme. It is used when
    nothing is asked for; a scheme that is not named here takes the first of `number_types`."""
    as_stored: bool = False
    """Whether, when nothing is asked for, the smallest of `number_types` is taken that holds the
    network's numbers exactly: the one that they were stored in."""
    takes_context: bool = False
    """Whether the result has room for a number of positions that is chosen when it is written."""
    usual_context: int | None = None
    """That number when none is asked for, at most the model's own; the model's own when None."""
    cache_bytes: int = 4
    """Bytes of one number in the cache of the program that is written."""
    runtime: str | None = None
    """Key of RUNTIMES by which the result is run before it appears; None where it is read back by
    our own reader."""
    model_within: Callable[[Path], Path] | None = None
    """Takes the result and gives the file or folder in it that is read back or run, written beside
    the result where it must be unpacked; None where the result is that itself."""
    write_beside: Callable[[Path, ModelToWrite], list[str]] | None = None
    """Takes the result under its own name and writes what others need beside it; returns a line for
    each file."""
    as_folder: Writer | None = None
    """What writes a folder instead, when the name asked for has not got the suffix."""

    def number_type(self, asked: str | None, quantized: Quantized | None) -> str:
        """How matrices are to be stored: as asked for, else as fits the model."""
        fitting = None if quantized is None else self.of_scheme.get(quantized.scheme)
        return asked or fitting or self.number_types[0]
