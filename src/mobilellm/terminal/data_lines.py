"""What `prepare` and `data-stats` print of text.

print_prepared(manifest, Path("data/book"), "shards", nodes=1)
print_statistics(figures)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm.printable import one_line, printable
from mobilellm.report.figures import count
from mobilellm.terminal.output import put

SHADES = ("\x1b[30;46m", "\x1b[30;106m")
PLAIN = "\x1b[0m"
BRACKETS = ("\u27e6", "\u27e7")


def print_prepared(manifest: dict[str, Any], out: Path, kind: str, nodes: int) -> None:
    """Documents in and out, and what each split holds, as shards or as samples ("jsonl")."""
    if "cleaning" in manifest:
        report = manifest["cleaning"]
        dropped = ", ".join(
            f"{step['documents']:,} {name}"
            for name, step in report["dropped"].items()
            if step["documents"]
        )
        put(
            f"cleaning:  {report['documents_read']:,} in = {report['documents_kept']:,} out + "
            f"dropped: {dropped or 'none'}"
        )
        put(f"  examples of each are in {out}/manifest.json")
    sources, skipped = manifest["sources"], manifest["skipped"]
    records, documents = (
        sum(source[key] for source in sources) for key in ("records", "documents")
    )
    left_out = ", ".join(f"{skipped[key]:,} {key}" for key in ("empty", "bad") if skipped[key])
    put(
        f"documents: {records:,} in = {documents:,} out + {records - documents:,} skipped"
        f"{f' ({left_out})' if left_out else ''}"
    )
    for where, why in skipped["first"][:3] if skipped["bad"] else ():
        put(one_line(f"  skipped {where}: {why}"))
    if skipped["empty"] + skipped["bad"] > 3 and skipped["bad"]:
        put(f"  the first {len(skipped['first'])} are listed in {out}/manifest.json")
    for name, split in manifest["splits"].items():
        if kind == "jsonl":
            rest = sum(split["tokens_left_out"].values())
            put(
                f"{name:8} {split['samples']:>9,} samples of {manifest['sample_ids']:,} ids; "
                f"the {rest:,} tokens after the last whole ones are left out"
            )
            continue
        put(
            f"{name:8} {split['documents']:>9,} documents  {split['tokens']:>13,} tokens  "
            f"{split['bytes']:>13,} bytes of text  "
            f"{split['bytes'] / max(1, split['tokens']):.2f} bytes a token"
        )
    size = manifest["tokenizer"]["vocab_size"]
    where = f"{out} for {nodes} nodes" if kind == "jsonl" else f"{out}"
    put(
        f"{count(manifest['splits']['train']['tokens'])} tokens to train on in "
        f"{where}, of a vocabulary of {size:,}"
    )


def print_statistics(figures: dict[str, Any]) -> None:
    """Figures of prepared data."""
    for name, split in figures["splits"].items():
        counts = (f"{split[key]:>14,} {key}" for key in ("documents", "tokens", "bytes"))
        put(f"{name:8} {'  '.join(counts)}  {split['bytes_per_token']:.2f} bytes a token")
    vocabulary, length = figures["vocabulary"], figures["length"]
    used = f"{vocabulary['used']:,} of {figures['tokenizer']['vocab_size']:,} used"
    put(f"vocabulary  {used}, {vocabulary['entropy_bits']:.2f} bits of entropy a token")
    span = f"{length['least']:,} to {length['most']:,}"
    put(f"\ndocument lengths in tokens (mean {length['mean']:,.0f}, {span})")
    most = max((row["documents"] for row in figures["lengths"]), default=1)
    for row in figures["lengths"]:
        bar = "#" * max(1, round(40 * row["documents"] / most))
        put(f"{row['from']:>11,}  {row['documents']:>11,}  {bar}")
    put("\nsources")
    for source in figures["sources"]:
        weight = "" if source["weight"] is None else f"  weight {source['weight']:g}"
        name = one_line(source["name"])
        put(
            f"  {name:20} {count(source['tokens']):>8} tokens {source['share']:>6.1%}"
            f"  {source['documents']:>11,} documents"
            f"  {source['bytes_per_token']:.2f} bytes a token{weight}"
        )
    put("\nmost frequent tokens")
    for row in figures["frequent"][:10]:
        put(f"  {row['id']:>7} {row['piece']!r:16} {row['count']:>13,} {row['share']:>6.2%}")
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for sample in figures["samples"][:3]:
        if sample.get("pieces"):
            name = one_line(sample["source"])
            put(f"\n{name}, {sample['tokens']:,} tokens, trained on where marked:")
            sys.stdout.write(masked_text(sample["pieces"], colours) + "\n")
            continue
        text = " ".join(sample["text"].split())[:300]
        put(f"\n{one_line(sample['source'])}, {sample['tokens']:,} tokens: {text}")


def masked_text(pieces: Sequence[Mapping[str, Any]], colours: bool) -> str:
    """The tokens of a conversation: those that are trained on with a coloured ground, two shades in
    turns, so that each token is seen; without colours between brackets."""
    found, inside = [], False
    for number, piece in enumerate(pieces):
        text = printable(piece["text"])
        if colours:
            found.append(f"{SHADES[number % 2]}{text}{PLAIN}" if piece["trained"] else text)
            continue
        if piece["trained"] != inside:
            found.append(BRACKETS[inside])
            inside = piece["trained"]
        found.append(text)
    return "".join(found) + (BRACKETS[1] if inside else "")
