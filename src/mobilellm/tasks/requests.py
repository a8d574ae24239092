"""Requests for log-likelihoods: text to tokens as the harness's Hugging Face backend makes them,
grouped by item.

    requests = encode(pairs, encoder, max_length=2048)          # pairs of (context, continuation)
    # Those of one item share the beginning of their tokens.
    items = group(requests, keys)

Context and continuation are encoded together and divided after the context's own tokens; the
context's trailing spaces belong to the continuation; an empty context is the token that begins a
text. Longer than the model's context, a request loses tokens on the left. All of this is what
lm-eval's `TemplateLM` and `HFLM` do (version 0.4).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mobilellm.errors import UserError
from mobilellm.tokenizer.tokenizer import Tokenizer


class Encoder(Protocol):
    """What makes tokens of text for a model."""

    @property
    def prefix_id(self) -> int:
        """The token that stands for an empty context."""
        ...

    def encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        """Tokens of each text; with `special` also what the tokenizer puts around a text by
        itself (BOS)."""
        ...


class OwnEncoder:
    """Our tokenizers. A special token that a text spells out is that token, as in the harness."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @property
    def prefix_id(self) -> int:
        """BOS where there is one, else EOS. `UserError` when there is neither."""
        found = self.tokenizer.prefix_id
        if found is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name!r}: has neither BOS nor EOS to begin a text with"
            )
        return found

    def encode_batch(self, texts: list[str], special: bool) -> list[list[int]]:
        """As `Encoder` says."""
        found = self.tokenizer.encode_batch(texts, parse_special=True, alone=special)
        opening = self.tokenizer.token(self.tokenizer.bos_id)
        if special and opening and self.tokenizer.add_bos:
            for i, text in enumerate(texts):
                if text.startswith(opening):  # it spells out its BOS, and gets no second one
                    found[i] = self.tokenizer.encode(text, parse_special=True)
        return found


@dataclass(frozen=True)
class Request:
    """The log-likelihood wanted of `tokens[-scored:]` given the tokens before them."""

    tokens: tuple[int, ...]
    scored: int
    cut: int = 0
    """Tokens lost on the left because the model's context is shorter."""
    apart: bool = field(default=False, compare=False)
    """Whether the continuation was encoded by itself, since it merges into its context."""

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token."""
        return self.tokens[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """What is scored."""
        return self.tokens[-self.scored :]

    @property
    def key(self) -> str:
        """A hash of tokens and of what is scored: the name of its result."""
        digest = hashlib.blake2b(np.asarray(self.tokens, dtype="<i4").tobytes(), digest_size=12)
        digest.update(self.scored.to_bytes(4, "little"))
        return digest.hexdigest()


@dataclass(frozen=True)
class Result:
    """What a request gives."""

    loglikelihood: float
    """Nats, summed over the scored tokens."""
    greedy: bool
    """Whether each scored token is the model's first choice."""


def encode(pairs: Sequence[tuple[str, str]], encoder: Encoder, max_length: int) -> list[Request]:
    """Requests of (context, continuation) pairs.

    A continuation that merges into its context, so that both have no more tokens than the context
    alone, is encoded by itself after it. `UserError` for a continuation without tokens, or one that
    exceeds the model's context.
    """
    moved: list[tuple[str, str]] = []
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        moved.append(
            (context[: len(context) - spaces], context[len(context) - spaces :] + continuation)
        )
    contexts = list(
        dict.fromkeys(
            context for (given, _), (context, _) in zip(pairs, moved, strict=True) if given
        )
    )
    before = (
        dict(zip(contexts, (len(ids) for ids in encoder.encode_batch(contexts, True)), strict=True))
        if contexts
        else {}
    )
    behind = [i for i, (context, _) in enumerate(pairs) if context]
    alone = [i for i, (context, _) in enumerate(pairs) if not context]
    split: dict[int, tuple[list[int], int]] = {}
    for i, whole in zip(
        behind,
        encoder.encode_batch(["".join(moved[i]) for i in behind], True) if behind else [],
        strict=True,
    ):
        # Where the harness stops at a context of spaces without a token (no BOS), it counts as
        # empty here.
        split[i] = (
            (whole, len(whole) - before[moved[i][0]])
            if before[moved[i][0]]
            else ([encoder.prefix_id, *whole], len(whole))
        )
    for i, ids in zip(
        alone,
        encoder.encode_batch([pairs[i][1] for i in alone], False) if alone else [],
        strict=True,
    ):
        # A continuation that begins with the prefix token has its context already.
        split[i] = (
            (ids, len(ids) - 1)
            if ids[:1] == [encoder.prefix_id]
            else ([encoder.prefix_id, *ids], len(ids))
        )
    merged = [i for i in behind if split[i][1] < 1]
    if merged:
        left = encoder.encode_batch([moved[i][0] for i in merged], True)
        right = encoder.encode_batch([moved[i][1] for i in merged], False)
        for i, context_ids, ids in zip(merged, left, right, strict=True):
            split[i] = ([*context_ids, *ids], len(ids))
    found = [request(*split[i], max_length, pairs[i]) for i in range(len(pairs))]
    for i in merged:
        found[i] = replace(found[i], apart=True)
    return found


def request(
    tokens: Sequence[int], scored: int, max_length: int, pair: tuple[str, str] = ("", "")
) -> Request:
    """A request of `tokens`, cut on the left to `max_length` inputs."""
    if scored < 1 or scored >= len(tokens):
        raise UserError(
            f"the continuation {pair[1]!r} of {pair[0][-60:]!r} has no token of its own to score"
        )
    if scored > max_length:
        raise UserError(
            f"the continuation {pair[1][:60]!r} has {scored} tokens, the model's context is "
            f"{max_length}"
        )
    cut = max(0, len(tokens) - max_length - 1)
    return Request(tuple(tokens[cut:]), scored, cut)


@dataclass(frozen=True)
class Item:
    """Requests that are computed together: their inputs begin with the same `shared` tokens."""

    requests: tuple[Request, ...]
    shared: int

    @functools.cached_property
    def length(self) -> int:
        """Tokens the model computes for it: each beginning that requests share once."""
        inputs = sorted(request.inputs for request in self.requests)
        return sum(map(len, inputs)) - sum(common(pair) for pair in itertools.pairwise(inputs))


def group(requests: Sequence[Request], keys: Sequence[Hashable]) -> list[Item]:
    """Items of the requests with equal keys, each request once; those whose inputs begin
    differently stand alone."""
    found: dict[Hashable, dict[Request, None]] = {}
    seen: set[Request] = set()
    for request_, key in zip(requests, keys, strict=True):
        if request_ not in seen:
            seen.add(request_)
            found.setdefault((key, request_.tokens[0]), {})[request_] = None
    return [
        Item(tuple(members), common([member.inputs for member in members]))
        for members in found.values()
    ]


def common(sequences: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all sequences begin with alike."""
    low, high = min(sequences), max(sequences)  # those in between share at least what these two do
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))
