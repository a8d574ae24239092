"""Conversion: read any format, write another, reload what was written and compare.

result = convert(Path("runs/demo"), Path("demo.gguf"), "gguf", precision="Q8_0")
result.largest_difference        # of logits, on a fixed prompt
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mobilellm.errors import UserError
from mobilellm.files import disk_errors, new_folder, sync
from mobilellm.interop.checkpoint import Loaded, load, save_checkpoint, source_hash
from mobilellm.interop.gguf_writer import Precision
from mobilellm.interop.huggingface import plain
from mobilellm.model.config import SharedKV
from mobilellm.model.network import Network
from mobilellm.version import __version__

Target = Literal["hf", "gguf", "llama2c", "mobilellm"]
EXACT = (
    1e-3  # what float32 logits may differ by; the same products in another order differ by far less
)
PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class ConvertResult:
    """What was converted, and how well it came out."""

    source: str
    source_sha256: str
    out: str
    to: Target
    precision: Precision
    origin: dict[str, Any]
    largest_difference: float | None
    """Of the logits before and after, on a fixed prompt; none when not verified."""
    logit_std: float | None
    """Spread of the logits, to set the difference against."""
    same_first_choice: float | None
    """Share of positions where the likeliest token is the same."""
    notes: list[str]


def convert(
    source: Path, out: Path, to: Target, *, precision: Precision = "F32", fold: bool = False, shared_kv: SharedKV | None = None,
    approximate: bool = False, tokenizer: Path | None = None, llama2c_version: int = 0, verify: bool = True,
) -> ConvertResult:  # fmt: skip
    """Write the model at `source` to `out` in another format. `out` appears only when it is whole and, unless `verify`
    is off, has been read back and compared.

    `precision` is of GGUF. `UserError` for sources that are damaged, targets that cannot say what the network is, and an
    `out` that exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists already", hint="choose another name or remove it")
    if to != "gguf" and precision != "F32":
        raise UserError(f"precision {precision} is for --to gguf; {to} is written in float32")
    loaded = load(source, shared_kv=shared_kv, fold=fold, tokenizer=tokenizer)
    network, notes = loaded.network, []
    if to != "mobilellm":
        network = plain(loaded.network, approximate)
        if loaded.config.layer_repeats > 1:
            notes.append(f"shared layers unrolled: {network.config.num_hidden_layers} blocks")
            if loaded.config.shared_kv == "first":
                notes.append(
                    "approximate: each application computes K and V of its own, which the weights were not trained for"
                )
    sha256 = source_hash(source)
    origin = {
        "made_by": f"mobilellm {__version__} convert", "source": source.name, "source_sha256": sha256,
        "settings": {"to": to, "precision": precision, "fold": fold, "shared_kv": shared_kv, "approximate": approximate},
        "came_from": loaded.origin,
    }  # fmt: skip
    before = logits(loaded.network)
    with _staged(out, to) as staging:
        notes += _write(staging, network, loaded, to, precision, llama2c_version, origin)
        difference = spread = same = None
        if verify:
            after = logits(load(staging, tokenizer=tokenizer if to == "llama2c" else None).network)
            difference, spread = float((after - before).abs().max()), float(before.std())
            same = float((after.argmax(-1) == before.argmax(-1)).float().mean())
            exact = precision == "F32" and not (approximate and loaded.config.shared_kv == "first")
            if exact and difference > EXACT * max(1.0, spread):
                raise UserError(
                    f"{out}: reads back with logits that differ by {difference:.3g}: not written; this is a bug, report it"
                )
    return ConvertResult(
        source=str(source), source_sha256=sha256, out=str(out), to=to, precision=precision, origin=origin,
        largest_difference=difference, logit_std=spread, same_first_choice=same, notes=notes,
    )  # fmt: skip


@torch.inference_mode()
def logits(network: Network) -> torch.Tensor:
    """Logits (T, V) on a prompt that is the same for every format: tokens spread over the vocabulary."""
    config = network.config
    count = min(PROMPT_TOKENS, config.max_position_embeddings)
    ids = (torch.arange(count) * 7919 + 1) % config.vocab_size
    return network(ids[None])[0].float()


def _write(
    path: Path,
    network: Network,
    loaded: Loaded,
    to: Target,
    precision: Precision,
    llama2c_version: int,
    origin: dict[str, Any],
) -> list[str]:
    """Write the model under a staging name; returns notes."""
    if to == "gguf":
        from mobilellm.interop import gguf_writer

        return gguf_writer.save(path, network, loaded.tokenizer, precision, origin)
    if to == "llama2c":
        from mobilellm.interop import llama2c

        llama2c.save(path, network, llama2c_version)
        return (
            ["the tokenizer is written by itself: --tokenizer-out"]
            if loaded.tokenizer is not None
            else []
        )
    save_checkpoint(path, network, loaded.tokenizer, origin)
    return [] if loaded.tokenizer is not None else ["no tokenizer: the source has none"]


@contextlib.contextmanager
def _staged(out: Path, to: Target) -> Iterator[Path]:
    """A folder, or the name of a file, that becomes `out` when the block ends well."""
    if to in ("hf", "mobilellm"):
        with new_folder(out) as staging:
            yield staging
        return
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as folder:
            staging = Path(
                folder,
                out.name if out.suffix else out.name + (".bin" if to == "llama2c" else ".gguf"),
            )
            yield staging
            sync(staging)
            os.rename(staging, out)


def as_json(result: ConvertResult) -> dict[str, Any]:
    """The result as plain values."""
    return asdict(result)
