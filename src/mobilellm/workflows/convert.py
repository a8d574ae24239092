"""Conversion: read any format, write another, reload what was written and compare.

result = convert(Path("runs/demo"), Path("demo.gguf"), "gguf", precision="Q8_0")
result.largest_difference        # of logits, on a fixed prompt
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobilellm.errors import UserError, unknown_name
from mobilellm.export.targets import TARGETS
from mobilellm.files import disk_errors, new_folder, sync
from mobilellm.interop.load import load, source_hash
from mobilellm.interop.repeats import plain
from mobilellm.interop.writer import ModelToWrite, Writer
from mobilellm.model.config import SharedKV
from mobilellm.model.network import Network
from mobilellm.version import __version__

# Float32 logits may differ by this much; the same products in another order differ by far less.
EXACT = 1e-3
PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """What was converted, and how well it came out."""

    source: str
    source_sha256: str
    out: str
    to: str
    """Key of TARGETS."""
    precision: str
    """The number type of matrices in the file, one of the writer's `number_types`."""
    origin: dict[str, Any]
    largest_difference: float | None
    """Of the logits before and after, on a fixed prompt; None when not verified."""
    logit_std: float | None
    """Spread of the logits, to set the difference against."""
    same_first_choice: float | None
    """Share of positions where the likeliest token is the same."""
    notes: list[str]


def convert(
    source: Path,
    out: Path,
    to: str,
    *,
    precision: str | None = None,
    context: int | None = None,
    fold: bool = False,
    shared_kv: SharedKV | None = None,
    approximate: bool = False,
    tokenizer: Path | None = None,
    verify: bool = True,
) -> ConvertResult:
    """Write the model at `source` to `out` in the format `to`, a key of TARGETS.

    `out` appears only when it is whole and, unless `verify` is off, has been read back and
    compared. `precision` is how the file stores its matrices, the target's first choice when None;
    `context` is how many positions it has room for. `fold`, `shared_kv` and `tokenizer`
    are those of `load`. `UserError` for sources that are damaged, formats that cannot say what the
    network is, and an `out` that exists.
    """
    if to not in TARGETS:
        raise unknown_name("format", to, TARGETS)
    writer = TARGETS[to]
    if out.exists():
        raise UserError(f"{out}: exists already", hint="choose another name or remove it")
    precision = precision or writer.number_types[0]
    if precision not in writer.number_types:
        raise UserError(
            f"precision {precision}: {to} is written in {' or '.join(writer.number_types)}"
        )
    loaded = load(source, shared_kv=shared_kv, fold=fold, tokenizer=tokenizer)
    if loaded.tokenizer_fault is not None:
        raise loaded.tokenizer_fault
    network, quantized, notes = loaded.network, loaded.quantized, []
    _check_context(context, network, to)
    repeats = loaded.config.layer_repeats
    inexact = repeats > 1 and loaded.config.shared_kv == "first" and not writer.keeps_repeats
    if not writer.keeps_repeats:
        network = plain(loaded.network, approximate)
        quantized = None if quantized is None else quantized.unrolled(repeats)
        if repeats > 1:
            notes.append(f"shared layers unrolled: {network.config.num_hidden_layers} blocks")
    if inexact:
        notes.append(
            "approximate: each application computes K and V of its own, "
            "which the weights were not trained for"
        )
    sha256 = source_hash(source)
    settings = {
        "to": to,
        "precision": precision,
        "context": context,
        "fold": fold,
        "shared_kv": shared_kv,
        "approximate": approximate,
    }
    origin = {
        "made_by": f"mobilellm {__version__} convert",
        "source": source.name,
        "source_sha256": sha256,
        "settings": settings,
        "came_from": loaded.origin,
    }
    before = logits(loaded.network)
    difference = spread = same = None
    with _staged(out, writer) as staging:
        model = ModelToWrite(
            network=network,
            tokenizer=loaded.tokenizer,
            number_type=precision,
            origin=origin,
            quantized=quantized,
            context=context,
        )
        notes += writer.write(staging, model)
        if verify:
            after = logits(load(staging).network)
            difference, spread = float((after - before).abs().max()), float(before.std())
            same = float((after.argmax(-1) == before.argmax(-1)).float().mean())
            exact = precision == "F32" and not inexact
            if exact and difference > EXACT * max(1.0, spread):
                raise UserError(
                    f"{out}: reads back with logits that differ by {difference:.3g}: not written",
                    hint="this is a bug, report it",
                )
    return ConvertResult(
        source=str(source),
        source_sha256=sha256,
        out=str(out),
        to=to,
        precision=precision,
        origin=origin,
        largest_difference=difference,
        logit_std=spread,
        same_first_choice=same,
        notes=notes,
    )


def _check_context(context: int | None, network: Network, to: str) -> None:
    """`UserError` for a context that the target cannot have."""
    if context is None:
        return
    longest = network.config.max_position_embeddings
    if not TARGETS[to].takes_context:
        fitting = ", ".join(name for name, target in TARGETS.items() if target.takes_context)
        raise UserError(
            f"--context: {to} always has the model's own {longest} positions",
            hint=f"leave it out; it is for {fitting}",
        )
    if not 1 <= context <= longest:
        raise UserError(f"context {context}: must be from 1 to the model's {longest} positions")


@torch.inference_mode()
def logits(network: Network) -> torch.Tensor:
    """Logits (T, V) on a prompt that is the same for every format: tokens over the vocabulary."""
    config = network.config
    count = min(PROMPT_TOKENS, config.max_position_embeddings)
    ids = (torch.arange(count) * 7919 + 1) % config.vocab_size
    return network(ids[None])[0].float()


@contextlib.contextmanager
def _staged(out: Path, writer: Writer) -> Iterator[Path]:
    """A folder, or the name of a file, that becomes `out` when the block ends well."""
    if not writer.suffix:
        with new_folder(out) as staging:
            yield staging
        return
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as folder:
            staging = Path(folder, out.name if out.suffix else out.name + writer.suffix)
            yield staging
            sync(staging)
            os.rename(staging, out)
