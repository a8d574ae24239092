"""Scores of a model that a runtime runs: log-likelihoods token by token, since a session gives the
logits of the last token alone.

    engine = Engine(SessionBackend(session))
    score = session_score(session, tokenizer, Path("book.txt"), max_tokens=2000)

A context is read at once; each scored token is then one call of the runtime.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import text_tokens
from mobilellm.evaluate.perplexity import Score, TokenList, score_of, windows
from mobilellm.files import sha256_file
from mobilellm.model.loss import IGNORED
from mobilellm.runtimes.running import RunningModel
from mobilellm.runtimes.session import Session
from mobilellm.streams.places import Place
from mobilellm.tasks.campaign import Subject
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.requests import Item, OwnEncoder, Result
from mobilellm.tokenizer.tokenizer import Tokenizer


def log_probability(logits: np.ndarray, token: int) -> tuple[float, bool]:
    """log P(token) in nats from logits (V,), and whether it is the likeliest."""
    best = float(logits.max())
    total = float(np.exp(logits - best, dtype=np.float32).sum(dtype=np.float64))
    return float(logits[token]) - best - math.log(total), int(logits.argmax()) == token


@dataclass
class SessionBackend:
    """A session as the engine's backend: one item after the other."""

    session: Session
    pads: ClassVar[bool] = False

    @property
    def max_length(self) -> int:
        """The session's context."""
        return self.session.context

    def order(self, item: Item) -> tuple[int, ...]:
        """The longest first."""
        return (-item.length, -item.shared)

    def cost(self, item: Item) -> int:
        """Its length."""
        return item.length

    def score(self, items: Sequence[Item]) -> list[list[Result]]:
        """As `Backend` says."""
        return [self.score_item(item) for item in items]

    def score_item(self, item: Item) -> list[Result]:
        """Results of its requests; a context that the next request shares is read once where
        nothing was read after it."""
        found: list[Result] = []
        held: tuple[int, ...] = ()
        logits = np.empty(0)
        for request in item.requests:
            context = request.tokens[: len(request.tokens) - request.scored]
            if context != held:
                self.session.reset()
                logits = self.session.feed(context)
                held = context
            values, greedy = 0.0, True
            for number, token in enumerate(request.targets, 1):
                value, likeliest = log_probability(logits, token)
                values, greedy = values + value, greedy and likeliest
                if number < request.scored:
                    logits = self.session.feed([token])
                    held = (*held, token)
            found.append(Result(values, greedy))
        return found


def session_subject(name: str, path: Path, running: RunningModel) -> Subject:
    """The running model at `path` as one to score on tasks.

    How many parameters it has is not known of every file, and left at 0.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    digest = hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()
    return Subject(
        name=name,
        engine=Engine(SessionBackend(running.session)),
        encoder=OwnEncoder(running.tokenizer),
        fingerprint=f"{digest[:24]}-{running.runtime}",
        parameters=0,
    )


def session_score(
    session: Session,
    tokenizer: Tokenizer,
    path: Place,
    *,
    sequence_length: int = 0,
    stride: int = 0,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score of a text file (UTF-8), as `evaluate.held_out.score_text` counts it.

    Windows are of `sequence_length` tokens, the session's context where that is 0; each is read
    token by token. `max_tokens` ends the text after so many. `UserError` when there is nothing to
    score, or the windows exceed the context.
    """
    length = sequence_length or session.context
    if length > session.context:
        raise UserError(f"sequence length {length} exceeds the file's context of {session.context}")
    if not 0 <= stride <= length:
        raise UserError(f"stride {stride}: must be from 1 to {length}, or 0 for the same")
    ids, text_bytes = text_tokens(tokenizer, path, max_tokens)
    stream = TokenList(ids)
    prefix = tokenizer.prefix_id
    nats, counted, total = 0.0, 0, len(ids) - (prefix is None)
    for inputs, targets in windows(stream, length, length, prefix, stride or length):
        session.reset()
        row, wanted = inputs[0].tolist(), targets[0]
        unscored = int((wanted == IGNORED).sum())  # they stand before the others
        for place, token in enumerate(wanted[unscored:].tolist(), unscored):
            fed = row[: place + 1] if place == unscored else row[place : place + 1]
            nats -= log_probability(session.feed(fed), token)[0]
            counted += 1
            if progress:
                progress(counted, total)
    return score_of(nats, counted, text_bytes)
