"""The peer that scores are compared with: lm-eval's Hugging Face backend, and requests for both."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mobilellm.tasks.requests import Result

CONTEXT = 48
PAIRS = [
    ("", "Before we proceed any further"),
    ("Speak,", " speak."),
    ("Speak, ", "speak."),
    ("Speak,  \n", "speak."),
    ("First Citizen:\nYou are all resolved rather to die than to famish?", " yes"),
    ("First Citizen:\nYou are all resolved rather to die than to famish?", " no"),
    ("word " * 60, "the beginning of this is lost"),
    ("word " * 60, "and of this"),
    ("", "very long " * 4),
]


def items_of(sample_text: str, count: int, seed: int) -> tuple[list[tuple[str, str]], list[int]]:
    """Contexts from the text, each with one to five continuations, the second of them often the
    first and more."""
    draw, pairs, keys = random.Random(seed), [], []
    for item in range(count):
        start = draw.randrange(40_000)
        context = sample_text[start : start + draw.randrange(1, 90)]
        for choice in range(draw.randrange(1, 6)):
            at = draw.randrange(40_000)
            text = " " + sample_text[at : at + draw.randrange(1, 40)]
            pairs.append(
                (
                    context,
                    pairs[-1][1] + " and more" if choice == 1 and draw.random() < 0.5 else text,
                )
            )
            keys.append(item)
    return pairs, keys


def harness_results(
    folder: Path, pairs: list[tuple[str, str]], **more: object
) -> list[tuple[float, bool]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, **more)
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    return model.loglikelihood(instances, disable_tqdm=True)


def agree(ours: list[Result], theirs: list[tuple[float, bool]], limit: float = 1e-3) -> None:
    assert len(ours) == len(theirs)
    for mine, (loglikelihood, greedy) in zip(ours, theirs, strict=True):
        assert mine.loglikelihood == pytest.approx(loglikelihood, abs=limit)
        assert mine.greedy == greedy
