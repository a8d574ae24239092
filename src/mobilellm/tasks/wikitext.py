"""WikiText-2 perplexity as the original's eval.py counts it, so that numbers compare.

    wikitext_perplexity(engine, encoder, Path("data/eval"))["perplexity"]

The test set's lines are joined with blank lines and tokenized as one text with BOS in front
(where the tokenizer adds one); the tokens are cut into windows that do not overlap, the rest
after the last whole window is dropped. A window's mean loss over its length - 1 predictions is
multiplied by the length, and perplexity is exp(sum / (windows x length)): the first token of
each window counts as if it had the window's mean loss.

With a stride, windows overlap: each begins `stride` tokens after the one before and scores what
that one did not reach, up to the text's last token; perplexity is exp of the mean loss over all
tokens scored, which is all but the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import read_text
from mobilellm.files import sha256_file
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.requests import Encoder, Request, request

FILE = "wikitext2_raw/wiki.test.raw"
SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
BLANK = " "  # how the file spells an empty line
LENGTH = 2048


def joined(path: Path) -> str:
    """The test set as one text: each line keeps its newline, blank ones are empty, and "\\n\\n"
    stands between them."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()
    return "\n\n".join("" if line == BLANK else f"{line}\n" for line in lines)


def wikitext_perplexity(
    engine: Engine,
    encoder: Encoder,
    data: Path,
    *,
    length: int = 0,
    stride: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity, mean loss (nats), windows (`count`), tokens and `sha256`; "altered" when the
    file is not the known one.

    `length` 0 is 2048, or the model's context where that is shorter; the length used is among
    the results. `stride` 0 is the original's procedure; from 1 to `length` - 1, that of
    overlapping windows. `UserError` when `length` exceeds the context, `stride` that limit, or
    the text has no whole window.
    """
    path, context = data / FILE, engine.backend.max_length
    length = length or min(LENGTH, context)
    if not 2 <= length <= context:
        raise UserError(f"windows of {length} tokens: must be from 2 to the model's {context}")
    if not 0 <= stride < length:
        raise UserError(
            f"stride {stride}: must be from 1 to {length - 1}, or 0 for windows that do not overlap"
        )
    tokens = encoder.encode_batch([joined(path)], True)[0]
    if len(tokens) < length:
        raise UserError(f"{path}: {len(tokens)} tokens, less than one window of {length}")
    requests = overlapping(tokens, length, stride) if stride else disjoint(tokens, length)
    results = engine.score(requests, range(len(requests)), progress=progress)
    # All windows of the original's procedure score alike, so that the mean over tokens is its mean
    # over windows.
    loss = -math.fsum(result.loglikelihood for result in results) / sum(
        each.scored for each in requests
    )
    digest = sha256_file(path)
    found: dict[str, Any] = {
        "perplexity": math.exp(loss),
        "loss": loss,
        "count": len(requests),
        "length": length,
        "tokens": len(tokens),
        "split": "test",
        "protocol": "original",
        "sha256": digest,
    }
    if stride:
        found |= {"protocol": "sliding", "stride": stride}
    return found | (
        {}
        if digest == SHA256
        else {"altered": f"{path}: altered, its sha256 is not the known {SHA256[:12]}"}
    )


def disjoint(tokens: list[int], length: int) -> list[Request]:
    """The original's windows; what comes after the last whole one is left out."""
    ends = range(length, len(tokens) + 1, length)
    return [request(tokens[end - length : end], length - 1, length) for end in ends]


def overlapping(tokens: list[int], length: int, stride: int) -> list[Request]:
    """Windows of `length` inputs and targets together, of which each after the first scores its
    last `stride` at most."""
    found, scored = [], 1  # the first token has nothing before it
    while scored < len(tokens):
        end = min(len(tokens), length if scored == 1 else scored + stride)
        found.append(request(tokens[max(0, end - length) : end], end - scored, length))
        scored = end
    return found
