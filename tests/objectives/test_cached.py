"""Learning from a kept part of a teacher's distributions, against the plain way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.model.shapes import (
    WIDTH_32,
    assert_same_gradients,
    assert_same_step,
    gradients,
    learner_and_reference,
)
from tests.objectives.test_distillation import batch, plain

from mobilellm.model.network import Network
from mobilellm.objectives.cached import CachedDistillation


def kept(
    teacher: Network, inputs: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens, and the log-probabilities of these and of all others together."""
    with torch.no_grad():
        scores = (teacher(inputs) / temperature).double().log_softmax(-1)
    values, ids = scores.topk(k)
    rest = scores.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat((values, rest), -1)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 1.0), (0.3, 2.5), (0, 3)])
def test_with_all_tokens_it_is_the_whole_distance(
    weight: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm.model.loss.CHUNK_NUMBERS", 17 * WIDTH_32.vocab_size)
    student, teacher = learner_and_reference()
    inputs, targets = batch()
    beside = kept(teacher, inputs, WIDTH_32.vocab_size, temperature)
    loss = CachedDistillation(weight, temperature)(student, inputs, targets, None, *beside)
    assert_same_step(student, loss, plain(student, teacher, inputs, targets, weight, temperature))


@pytest.mark.parametrize("k", [1, 5, 306])
def test_the_rest_is_one_outcome(k: int) -> None:
    student, teacher = learner_and_reference()
    inputs, targets = batch()
    ids, scores = kept(teacher, inputs, k, 1.0)
    loss = CachedDistillation(1.0)(student, inputs, targets, None, ids, scores)
    loss.backward()
    found = gradients(student)
    log_student = student(inputs).log_softmax(-1)
    mine = log_student.gather(-1, ids)
    rest = log_student.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    apart = F.kl_div(
        torch.cat((mine, rest), -1), scores.float(), log_target=True, reduction="none"
    ).sum(-1)
    expected = apart[targets != -100].sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(found, gradients(student))
    whole = plain(student, teacher, inputs, targets, 1.0, 1.0).item()
    assert expected.item() <= whole * (1 + 1e-6)


def test_memory_is_tried_without_a_cache() -> None:
    student, _ = learner_and_reference()
    inputs, targets = batch()
    found = CachedDistillation(0.5)(student, inputs, targets)
    assert found.item() == pytest.approx(student.loss(inputs, targets, "sum").item(), rel=1e-6)
