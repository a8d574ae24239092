"""The distillation objective against the plain way, which has both networks' whole logits."""

import pytest
import torch
import torch.nn.functional as F
from tests.model.shapes import (
    WIDTH_32,
    assert_same_step,
    learner_and_reference,
)

from mobilellm.model.loss import NextToken
from mobilellm.model.network import Network
from mobilellm.objectives.distillation import Distillation


def batch(rows: int = 3, length: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, WIDTH_32.vocab_size, (rows, length + 1))
    targets = ids[:, 1:].clone()
    targets[0, 5:11] = -100
    return ids[:, :-1], targets


def plain(
    student: Network,
    teacher: Network,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    weight: float,
    temperature: float,
    documents: torch.Tensor | None = None,
) -> torch.Tensor:
    logits, taught = (
        n.output(n.hidden(inputs, documents=documents)).flatten(0, 1) for n in (student, teacher)
    )
    counted = targets.flatten() != -100
    hard = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    distance = F.kl_div(
        F.log_softmax(logits / temperature, -1)[counted],
        F.log_softmax(taught / temperature, -1)[counted],
        log_target=True,
        reduction="sum",
    )
    return (1 - weight) * hard + weight * temperature**2 * distance


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 1.0), (0.3, 2.5), (0, 3)])
def test_loss_and_gradients_are_those_of_the_plain_way(
    weight: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm.model.loss.CHUNK_NUMBERS", 17 * WIDTH_32.vocab_size)  # 4 chunks
    student, teacher = learner_and_reference()
    inputs, targets = batch()
    loss = Distillation(teacher, weight, temperature)(student, inputs, targets)
    assert_same_step(student, loss, plain(student, teacher, inputs, targets, weight, temperature))


def test_both_networks_see_a_document_alone() -> None:
    student, teacher = learner_and_reference()
    inputs, targets = batch()
    documents = (torch.arange(20) // 7).expand(3, -1)
    found = Distillation(teacher, 0.5, 1.0)(student, inputs, targets, documents)
    expected = plain(student, teacher, inputs, targets, 0.5, 1.0, documents)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.item() != pytest.approx(
        Distillation(teacher, 0.5, 1.0)(student, inputs, targets).item(), rel=1e-4
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student, _ = learner_and_reference()
    inputs, targets = batch()
    loss = Distillation(student, 1.0, 2.0)(student, inputs, targets)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-3)
    largest = max(p.grad.abs().max().item() for p in student.parameters())
    student.zero_grad()
    NextToken()(student, inputs, targets).backward()
    assert largest < 1e-5 * max(p.grad.abs().max().item() for p in student.parameters())
