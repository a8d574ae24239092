"""Conversion: read any format, write another, and read or run what was written to compare.

result = convert(Path("runs/demo"), Path("demo.gguf"), "gguf", precision="Q8_0")
result.largest_difference        # of logits, on a fixed prompt
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobilellm.cards.model_card import check_names, facts_of
from mobilellm.errors import UserError, unknown_name
from mobilellm.export.targets import PROGRAMS, TARGETS
from mobilellm.files import check_absent, disk_errors, existing_parent, new_folder, sync
from mobilellm.interop.folder import stored_type
from mobilellm.interop.load import load, source_hash
from mobilellm.interop.repeats import plain
from mobilellm.interop.writer import ModelToWrite, Writer
from mobilellm.model.config import ModelConfig, SharedKV
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network
from mobilellm.quantize.grid import portable
from mobilellm.quantize.methods import quantized_as_trained
from mobilellm.quantize.quantized import Quantized
from mobilellm.runtimes.session import Runtime
from mobilellm.runtimes.table import RUNTIMES
from mobilellm.version import __version__
from mobilellm.workflows.verification import (
    Comparison,
    check_tokens,
    compare,
    logits,
    run_and_compare,
)

# Float32 logits that are read back may differ by this much; the same products in another order
# differ by far less.
EXACT = 1e-3
FLOATS = ("F32", "F16", "BF16")
"""Number types that are no grid: a model keeps the weights that it has."""
# Bytes a parameter in a file, at the least; the embedding of 4-bit types has 8 bits.
LEAST_BYTES = {"F16": 2.0, "BF16": 2.0, "Q8_0": 1.06, "INT8": 1.0, "Q4_0": 0.56, "INT4": 0.56}


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
    kl: float | None
    """Mean Kullback-Leibler divergence of the distributions after from those before, nats a token;
    of programs, which are run."""
    loss_before: float | None
    """On a short text, nats a token: of the network that was written (of programs)."""
    loss_after: float | None
    """On the same text, of the file as its runtime computes it."""
    runtime: str | None
    """What the file was run by before it appeared; None where it was read back, or not verified."""
    context: int | None
    """Positions that the result has room for, where that is chosen when it is written."""
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
    ignore_keys: Collection[str] = (),
    license: str | None = None,
    base_model: str | None = None,
    verify: bool = True,
) -> ConvertResult:
    """Write the model at `source` to `out` in the format `to`, a key of TARGETS.

    `out` appears only when it is whole and, unless `verify` is off, has been read back, or run by
    the runtime that it is for, and compared. `precision` is how the file stores its matrices, the
    target's choice for such a model when None: of a quantized one, what holds its integers.
    `context` is how many positions it has room for, the target's usual number when None. `fold`,
    `shared_kv`, `tokenizer` and `ignore_keys` are those of `load`. `license` and `base_model` are
    for the card of a folder (cards/model_card.py). `UserError` for sources that are damaged,
    formats that cannot say what the network is, and an `out` that exists.
    """
    if to not in TARGETS:
        raise unknown_name("format", to, TARGETS)
    check_names(license, base_model)
    writer = TARGETS[to]
    if writer.as_folder is not None and out.suffix != writer.suffix:
        writer = writer.as_folder
    check_absent(out)
    if precision is not None and precision not in writer.number_types:
        raise UserError(
            f"precision {precision}: {to} is written in {' or '.join(writer.number_types)}"
        )
    runtime = None if writer.runtime is None else RUNTIMES[writer.runtime]
    if verify and runtime is not None:
        _check_installed(runtime, to)
    loaded = load(source, shared_kv=shared_kv, fold=fold, tokenizer=tokenizer, ignored=ignore_keys)
    if loaded.tokenizer_fault is not None:
        raise loaded.tokenizer_fault
    if loaded.config.feed_forward != "swiglu" and to != "mobilellm":
        raise UserError(
            f"{source}: {to} does not hold a feed-forward with ReLU, which is for comparisons",
            hint="keep it with --to mobilellm, or train one without feed_forward",
        )
    network, quantized, notes = loaded.network, loaded.quantized, [*loaded.notes]
    context = _context(context, network.config, to, writer)
    if precision is None and quantized is None and writer.as_stored:
        precision = stored_type(network)
    precision = writer.number_type(precision, quantized)
    if quantized is None and precision not in FLOATS:
        quantized = quantized_as_trained(network, loaded.origin)
        if quantized is not None:
            notes.append(f"{quantized.scheme}: the grid that the model was trained for")
    repeats = loaded.config.layer_repeats
    # Programs apply a block several times in a row, or have each application as a block.
    keeps = writer.keeps_repeats and (to == "mobilellm" or loaded.config.layer_order == "immediate")
    inexact = repeats > 1 and loaded.config.shared_kv == "first" and not keeps
    if not keeps:
        network = plain(loaded.network, approximate)
        order = loaded.config.application_order
        quantized = None if quantized is None else quantized.unrolled(order)
        if repeats > 1:
            notes.append(
                f"shared layers unrolled: {network.config.num_hidden_layers} blocks, "
                f"for {to} cannot store one once that is applied {repeats} times"
            )
    if inexact:
        notes.append(
            "approximate: each application computes K and V of its own, "
            "which the weights were not trained for"
        )
    if quantized is not None and precision not in FLOATS:
        network, quantized, note = with_held_scales(network, quantized, to)
        notes += note
    _check_room(out, network.config, precision)
    if context is not None:
        notes.append(context_note(network.config, context, writer.cache_bytes))
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
    found: Comparison | None = None
    checked: list[Comparison] = []

    def check(file: Path, holds: Network, exact: bool) -> str:
        assert runtime is not None
        checked.append(run_and_compare(file, runtime, holds, loaded.tokenizer, exact=exact))
        return str(checked[-1])

    with _staged(out, writer) as staging:
        model = ModelToWrite(
            network=network,
            tokenizer=loaded.tokenizer,
            number_type=precision,
            origin=origin,
            generation=loaded.generation,
            quantized=quantized,
            context=context,
            card=facts_of(source, license, base_model),
            check=check if verify and runtime is not None else None,
        )
        notes += writer.write(staging, model)
        written = staging
        if verify and writer.model_within is not None:
            written = writer.model_within(staging)
        if checked:
            found = checked[0]
        elif verify and runtime is not None:
            found = run_and_compare(
                written, runtime, network, loaded.tokenizer, exact=precision == "F32"
            )
        elif verify:
            after = load(written)
            found = compare(before, logits(after.network))
            notes += check_tokens(written, after, loaded.tokenizer)
            exact = precision == "F32" and not inexact
            # A quantized model's own integers come back as the very numbers they were.
            grid = quantized is not None and precision == writer.of_scheme.get(quantized.scheme)
            bound = 0.0 if grid else EXACT * max(1.0, found.logit_std)
            lost = found.largest_difference
            if grid and lost > bound:  # scales that were rounded are compared as they were written
                lost = compare(logits(network), logits(after.network)).largest_difference
            if (exact or (grid and not inexact)) and lost > bound:
                raise UserError(
                    f"{out}: reads back with logits that differ by {lost:.3g}: not written",
                    hint="this is a bug, report it",
                )
    if writer.write_beside is not None:
        notes += writer.write_beside(out, model)
    return ConvertResult(
        source=str(source),
        source_sha256=sha256,
        out=str(out),
        to=to,
        precision=precision,
        origin=origin,
        largest_difference=None if found is None else found.largest_difference,
        logit_std=None if found is None else found.logit_std,
        same_first_choice=None if found is None else found.same_first_choice,
        kl=None if found is None else found.kl,
        loss_before=None if found is None else found.loss_before,
        loss_after=None if found is None else found.loss_after,
        runtime=None if found is None else writer.runtime,
        context=context,
        notes=notes,
    )


def with_held_scales(
    network: Network, quantized: Quantized, to: str
) -> tuple[Network, Quantized, list[str]]:
    """The network and its grid with the scales that the format holds: float16 in GGUF, the grid's
    own (8 significant bits) in programs; and a note where they are not what they were.

    Scales of our own grid are exact everywhere; ParetoQ's were learned in another number type.
    """
    if to in PROGRAMS and to != "web":
        kind, found = "of 8 significant bits", quantized.with_scales(portable)
    else:
        kind, found = "in float16", quantized.with_scales(lambda scales: scales.half().float())
    pairs = ((found.weights[name], weight) for name, weight in quantized.weights.items())
    if all(torch.equal(new.scales, old.scales) for new, old in pairs):
        return network, quantized, []
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in found.weights:
                parameter.copy_(found.weights[name].dequantized())
    return network, found, [f"integers as they were, their scales {kind}"]


def _check_installed(runtime: Runtime, to: str) -> None:
    """`UserError` that names what is missing to run the result."""
    try:
        runtime.require()
    except UserError as error:
        raise UserError(
            f"{to}: the result is run before it appears, and {error.what}",
            hint=f"{error.hint}, or write it unseen with --no-verify",
        ) from None


def _context(context: int | None, config: ModelConfig, to: str, writer: Writer) -> int | None:
    """Positions that the result will have room for; None where the target does not choose.

    `UserError` for a context that the target cannot have.
    """
    longest = config.max_position_embeddings
    if not writer.takes_context:
        if context is None:
            return None
        fitting = ", ".join(name for name, target in TARGETS.items() if target.takes_context)
        raise UserError(
            f"--context: {to} always has the model's own {longest} positions",
            hint=f"leave it out; it is for {fitting}",
        )
    if context is None:
        return min(longest, writer.usual_context or longest)
    if not 1 <= context <= longest:
        raise UserError(f"context {context}: must be from 1 to the model's {longest} positions")
    return context


def context_note(config: ModelConfig, context: int, bytes_per_number: int) -> str:
    """How much memory keys and values of a whole context take while the file runs."""
    size = context * ModelCosts.of(config).kv_cache_bytes_per_token(bytes_per_number)
    return f"context: {context:,} tokens, whose keys and values take {size / 1e6:,.1f} MB of memory"


def _check_room(out: Path, config: ModelConfig, precision: str) -> None:
    """`UserError` when the disk has less room than the parameters alone take."""
    needed = ModelCosts.of(config).parameters["total"] * LEAST_BYTES.get(precision, 4.0)
    free = shutil.disk_usage(existing_parent(out)).free
    if needed > free:
        raise UserError(
            f"{out}: takes at least {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free",
            hint="free some space, or choose a smaller number type with --precision",
        )


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
