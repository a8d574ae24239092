"""How log-likelihoods become scores: the harness's way and the paper's. The two are never mixed
in one number.

- `harness`: `acc` takes the likeliest choice, `acc_norm` the likeliest per character; each task
  has what lm-eval gives it.
- `paper`: likelihood per character, but for OpenBookQA and BoolQ the likelihood relative to that of
  the same answer after "Answer:" alone. That is LLaMA's rule (arXiv 2302.13971, section 3), which
  MobileLLM says it follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mobilellm.errors import unknown_name
from mobilellm.tasks.harness_tasks import Document, HarnessTask
from mobilellm.tasks.requests import Result

Protocol = Literal["harness", "paper"]
RELATIVE = ("openbookqa", "boolq")
UNCONDITIONAL = "Answer:"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One item: what was asked, what each choice got, what was taken."""

    task: str
    protocol: str
    index: int
    context: list[str]
    """One, or one for each choice where the choices stand in the context."""
    continuations: list[str]
    loglikelihoods: list[float]
    """Nats."""
    scores: list[float]
    """What the protocol compares: the log-likelihood itself (harness), or what the paper's rule
    makes of it."""
    chosen: int
    chosen_norm: int
    """The choice per character (the same as `chosen` in the paper's protocol)."""
    gold: list[int]
    correct: bool
    """Whether `chosen` is right."""
    correct_norm: bool


def check_protocol(name: str) -> None:
    """`UserError` for a protocol that is not known."""
    if name not in get_args(Protocol):
        raise unknown_name("protocol", name, get_args(Protocol))


def more_pairs(
    task: HarnessTask, documents: Sequence[Document], protocol: str
) -> list[list[tuple[str, str]]]:
    """(context, continuation) pairs that a protocol needs of each item besides the harness's
    own."""
    if protocol != "paper" or task.name not in RELATIVE:
        return [[] for _ in documents]
    return [
        [(UNCONDITIONAL, continuation) for _, continuation in document.pairs]
        for document in documents
    ]


def first_largest(values: Sequence[float]) -> int:
    """The index of the largest value, the first of equals, as numpy's argmax has it."""
    return max(range(len(values)), key=values.__getitem__)


def contexts_of(task: HarnessTask, document: Document) -> list[str]:
    """The context of each choice."""
    return [context for context, _ in document.pairs[: len(task.choices(document.document))]]


def rankings(
    task: HarnessTask, document: Document, results: Sequence[Result], protocol: str
) -> list[list[float]]:
    """The numbers that choices of a multiple-choice item are taken by, one a choice: what the
    protocol compares, and the harness's likelihood per character besides."""
    choices = task.choices(document.document)
    values = [result.loglikelihood for result in results[: len(choices)]]
    # Where the choices stand in the context (WinoGrande) what is scored is the ending, of one
    # length for all.
    own_contexts = len(set(contexts_of(task, document))) > 1
    measured = [ending for _, ending in document.pairs[: len(choices)]] if own_contexts else choices
    per_character = [value / len(text) for value, text in zip(values, measured, strict=True)]
    if protocol != "paper":
        return [values, per_character]
    if task.name not in RELATIVE:
        return [per_character]
    alone = [result.loglikelihood for result in results[len(choices) :]]
    return [[value - base for value, base in zip(values, alone, strict=True)]]


def sample(
    task: HarnessTask, document: Document, results: Sequence[Result], protocol: str
) -> Sample:
    """What a multiple-choice item comes to."""
    gold = task.gold(document.document)
    contexts = contexts_of(task, document)
    ranked = rankings(task, document, results, protocol)
    chosen = first_largest(ranked[0])
    norm = first_largest(ranked[-1])
    return Sample(
        task=task.name,
        protocol=protocol,
        index=document.index,
        context=contexts if len(set(contexts)) > 1 else contexts[:1],
        continuations=[text for _, text in document.pairs[: len(contexts)]],
        loglikelihoods=[result.loglikelihood for result in results[: len(contexts)]],
        scores=ranked[0],
        chosen=chosen,
        chosen_norm=norm,
        gold=gold,
        correct=chosen in gold,
        correct_norm=norm in gold,
    )
