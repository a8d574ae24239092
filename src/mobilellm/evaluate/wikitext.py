"""WikiText-2 perplexity as the original's eval.py counts it, so that numbers compare.

    wikitext_perplexity(engine, encoder, Path("data/eval"))["perplexity"]

The test set's lines are joined with blank lines and tokenised as one text with BOS in front (where the tokenizer adds one); the
tokens are cut into windows that do not overlap, the rest behind the last whole window is dropped. A window's mean loss over its
length - 1 predictions is multiplied by the length, and perplexity is exp(sum / (windows x length)): the first token of each
window counts as if it had the window's mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.evaluate.engine import Engine
from mobilellm.evaluate.heldout import read_text
from mobilellm.evaluate.requests import Encoder, request
from mobilellm.files import sha256_file

FILE = "wikitext2_raw/wiki.test.raw"
SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
BLANK = " "  # how the file spells an empty line
LENGTH = 2048


def joined(path: Path) -> str:
    """The test set as one text: each line keeps its newline, blank ones are empty, and "\\n\\n" stands between them."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return "\n\n".join("" if line == BLANK else f"{line}\n" for line in lines)


def wikitext_perplexity(
    engine: Engine, encoder: Encoder, data: Path, *, length: int = 0, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Perplexity, mean loss (nats), windows (`count`), tokens and `sha256`; "altered" when the file is not the known one.

    `length` 0 is 2048, or the model's context where that is shorter; the length used is among the results. `UserError` when
    it exceeds the context, or the text has no whole window.
    """
    path, context = data / FILE, engine.backend.max_length
    length = length or min(LENGTH, context)
    if not 2 <= length <= context:
        raise UserError(f"windows of {length} tokens: must be from 2 to the model's {context}")
    tokens = encoder.encode_batch([joined(path)], True)[0]
    starts = range(0, len(tokens) // length * length, length)
    if not starts:
        raise UserError(f"{path}: {len(tokens)} tokens, less than one window of {length}")
    requests = [request(tokens[start : start + length], length - 1, context) for start in starts]
    results = engine.score(requests, starts, progress=progress)
    loss = -math.fsum(result.loglikelihood for result in results) / (length - 1) / len(starts)
    digest = sha256_file(path)
    found: dict[str, Any] = {
        "perplexity": math.exp(loss), "loss": loss, "count": len(starts), "length": length, "tokens": len(tokens),
        "split": "test", "protocol": "original", "sha256": digest,
    }  # fmt: skip
    return found | ({} if digest == SHA256 else {"altered": f"{path}: altered, its sha256 is not the known {SHA256[:12]}"})
