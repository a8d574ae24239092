"""A model file that runs, with its tokenizer: what `generate`, `chat` and `eval` ask of a file.

    with open_model(Path("model.pte"), threads=2) as model:
        ids = prompt_ids(model.tokenizer, "Once upon")
        for token in generate(model.session, ids, 50, Sampling(temperature=0.8, seed=1)):
            ...

Tokens are drawn here for every runtime alike, so that files of the same numbers write the same
greedy text, and one seed gives one text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mobilellm.errors import UserError
from mobilellm.model.generation import Sampling, draw
from mobilellm.model.precision import Precision
from mobilellm.runtimes import ours
from mobilellm.runtimes.session import Runtime, Session
from mobilellm.runtimes.table import runtime_for
from mobilellm.tokenizer.tokenizer import Tokenizer


class Constraint(Protocol):
    """What holds a text to a form, token by token (`calls.held`)."""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        ...

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """The logits (V,), -inf for every token that cannot follow."""
        ...

    def take(self, token: int) -> None:
        """Note the token that was drawn."""
        ...


def next_token(
    logits: np.ndarray,
    sampling: Sampling,
    generator: torch.Generator,
    held: Constraint | None = None,
    before: Sequence[int] = (),
) -> int:
    """One token from logits (V,) after the tokens `before`, of those that `held` allows."""
    if held is not None:
        logits = held.masked(logits)
    return draw(torch.from_numpy(logits), sampling, generator, before)


@dataclass(frozen=True, kw_only=True)
class RunningModel:
    """A session, the tokenizer of its file, and what runs it."""

    session: Session
    tokenizer: Tokenizer
    runtime: str
    """Key of RUNTIMES."""
    notes: tuple[str, ...] = ()
    """What a user should know of how it runs."""


def default_runtime(path: Path, name: str | None = None) -> Runtime:
    """The runtime called `name`; without one our own network where it reads what lies at `path`,
    else the first installed one that is for it. `UserError` when there is none."""
    if name is None and path.exists() and ours.RUNTIME.recognizes(path):
        return ours.RUNTIME
    return runtime_for(path, name)


@contextlib.contextmanager
def open_model(
    path: Path,
    runtime: str | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
    precision: Precision | None = None,
) -> Iterator[RunningModel]:
    """The file at `path`, running by `default_runtime`; closed when the block ends.

    `precision` is for our own network (`ours.open_network`). `UserError` when it is given for
    another runtime, or the file has no tokenizer in it or beside it.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads {threads}: must be 1 or more")
    chosen = default_runtime(path, runtime)
    chosen.require()
    if precision is not None and chosen is not ours.RUNTIME:
        raise UserError(
            f"{path}: is computed in the precision that it was written in",
            hint="leave out --precision",
        )
    tokenizer = chosen.read_tokenizer(path)
    if tokenizer is None:
        raise UserError(
            f"{path}: has no tokenizer",
            hint="put its tokenizer.json or tokenizer.model beside it",
        )
    session: Session
    notes: tuple[str, ...] = ()
    if chosen is ours.RUNTIME:
        session = own = ours.open_network(path, context, threads, precision)
        notes = own.notes
    else:
        session = chosen.open(path, context, threads)
    try:
        yield RunningModel(session=session, tokenizer=tokenizer, runtime=chosen.name, notes=notes)
    finally:
        session.close()


def generate(
    session: Session,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] | None = None,
    held: Constraint | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens that continue `prompt`, appended to what the session
    holds, ending before a token of `stop`, or where `held` lets nothing follow.

    `stop` is the file's end-of-text tokens when not given. `UserError` when the prompt is empty, or
    prompt and new tokens together exceed the session's context.
    """
    if not prompt:
        raise UserError(
            "the prompt is empty and the model has no BOS token", hint="give at least one token"
        )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be 0 or more")
    if len(prompt) + max_new_tokens > session.context:
        raise UserError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones exceed the model's "
            f"context of {session.context}",
            hint=f"at most {max(0, session.context - len(prompt))} new ones fit",
        )
    stop = session.end_tokens if stop is None else stop
    generator = torch.Generator().manual_seed(sampling.seed)
    ids, seen = list(prompt), list(prompt)
    for _ in range(max_new_tokens):
        token = next_token(session.feed(ids), sampling, generator, held, seen)
        if token in stop:
            return
        if held is not None:
            held.take(token)
        yield token
        seen.append(token)
        if held is not None and held.finished:
            return
        ids = [token]
