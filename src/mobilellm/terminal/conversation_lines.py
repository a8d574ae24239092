"""What `prepare` prints of conversations and of pairs of answers.

lines = chat_lines(manifest, Path("data/talks"))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm.report.figures import count


def chat_lines(manifest: dict[str, Any], out: Path) -> Iterator[str]:
    """How many conversations came whole, shortened or not at all, and how much is trained on."""
    found = manifest["conversations"]
    yield (
        f"conversations: {found['whole']:,} whole, {found['shortened']:,} without their last "
        f"{found['messages_left_out']:,} messages, which are beyond {found['context']:,} "
        f"tokens, {found['left_out']:,} left out"
    )
    yield from _common_lines(manifest, found)
    for name, split in manifest["splits"].items():
        yield f"{name:8} {split['documents']:>9,} conversations  {split['tokens']:>13,} tokens"
    yield f"{count(found['trained_tokens'])} tokens of the assistant in {out}"


def preference_lines(manifest: dict[str, Any], out: Path) -> Iterator[str]:
    """How many pairs there are, and how full their rows."""
    found, row = manifest["preferences"], manifest["row"]
    yield f"pairs of answers: {found['pairs']:,}, {found['left_out']:,} left out"
    yield from _common_lines(manifest, found)
    for name, split in manifest["splits"].items():
        padding = found["padding_tokens"][name] / max(1, split["tokens"])
        yield (
            f"{name:8} {split['documents'] // 2:>9,} pairs in {found['rows'][name]:,} rows of "
            f"{row:,} tokens, {padding:.1%} of them padding"
        )
    yield f"train with data.sequence_length = {row - 1} on {out}"


def _common_lines(manifest: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """What was left out, and special tokens that are new."""
    for where, why in manifest["skipped"]["first"][:3]:
        yield f"  left out {where}: {why}"
    for token, how in found["special_tokens_added"].items():
        yield f"  new special token {token}: {how}"
