"""Preference training against the plain way: whole logits, each answer in a row of its own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.model.shapes import (
    WIDTH_32,
    assert_same_gradients,
    gradients,
    learner_and_reference,
)

from mobilellm.model.network import Network
from mobilellm.objectives.preference import Preference, answer_log_probabilities

LENGTHS = [[9, 12, 7, 6], [20, 14]]  # tokens of the documents of two rows, which are padded to 41
ROW = 41


@pytest.fixture
def networks() -> tuple[Network, Network]:
    return learner_and_reference()


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[tuple[torch.Tensor, int]]]]:
    """Inputs, targets and documents of two rows; and each answer alone: its ids, and how many come
    before what is trained on."""
    torch.manual_seed(1)
    ids = torch.randint(0, WIDTH_32.vocab_size, (2, ROW))
    trained = torch.zeros(2, ROW, dtype=torch.bool)
    documents = torch.zeros(2, ROW, dtype=torch.int32)
    alone: list[list[tuple[torch.Tensor, int]]] = []
    for row, lengths in enumerate(LENGTHS):
        alone.append([])
        start = 0
        for number, length in enumerate(lengths):
            end = ROW if number + 1 == len(lengths) else start + length  # padding is the last one's
            documents[row, start:end] = number
            asked = 3 + number
            trained[row, start + asked : start + length] = True
            alone[-1].append((ids[row, start : start + length], asked))
            start = end
    targets = torch.where(trained[:, 1:], ids[:, 1:], -100)
    return ids[:, :-1], targets, documents[:, :-1], alone


def log_probability(network: Network, ids: torch.Tensor, asked: int) -> torch.Tensor:
    """Of an answer after what was asked."""
    logits = network(ids[None, :-1])[0].log_softmax(-1)
    return logits.gather(1, ids[1:, None])[asked - 1 :].sum()


def trl(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's DPOTrainer, loss_type "sigmoid" without label smoothing: loss and reward margin."""
    chosen_logratio = policy_chosen - reference_chosen
    rejected_logratio = policy_rejected - reference_rejected
    delta = chosen_logratio - rejected_logratio
    return -F.logsigmoid(beta * delta), beta * chosen_logratio - beta * rejected_logratio


def test_loss_gradients_and_figures_are_those_of_the_plain_way(
    networks: tuple[Network, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm.model.loss.CHUNK_NUMBERS", 17 * WIDTH_32.vocab_size)
    policy, reference = networks
    inputs, targets, documents, alone = rows()
    table = torch.zeros(2, 4)
    losses, margins = [], []
    for row, answers in enumerate(alone):
        with torch.no_grad():
            for number, (ids, asked) in enumerate(answers):
                table[row, number] = log_probability(reference, ids, asked)
        for first in range(0, len(answers), 2):
            mine = [log_probability(policy, *answers[first + i]) for i in (0, 1)]
            loss, margin = trl(*mine, *table[row, first : first + 2], 0.05)
            losses.append(loss)
            margins.append(margin)
    assert len(losses) == 3
    expected = torch.stack(losses).sum()
    expected.backward()
    plain = gradients(policy)
    objective = Preference(0.05)
    loss = objective(policy, inputs, targets, documents, table)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(policy), plain)
    assert objective.counted(targets, documents).item() == 3
    figures = objective.figures()
    assert figures["reward_margin"].item() == pytest.approx(sum(m.item() for m in margins), 1e-4)
    assert figures["reward_accuracy"].item() == sum(m.item() > 0 for m in margins)
    assert objective.figures() == {}


def test_a_network_that_is_its_reference_has_no_margin(
    networks: tuple[Network, Network],
) -> None:
    _, reference = networks
    inputs, targets, documents, alone = rows()
    table = torch.zeros(2, 4)
    with torch.no_grad():
        for row, answers in enumerate(alone):
            for number, (ids, asked) in enumerate(answers):
                table[row, number] = log_probability(reference, ids, asked)
    objective = Preference(0.5)
    loss = objective(reference, inputs, targets, documents, table)
    assert loss.item() == pytest.approx(3 * 0.693147, abs=1e-4)
    assert objective.figures()["reward_margin"].item() == pytest.approx(0, abs=1e-3)


def test_memory_is_tried_without_documents(networks: tuple[Network, Network]) -> None:
    policy, _ = networks
    inputs, _, _, _ = rows()
    Preference(0.5)(policy, inputs, inputs).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_answers_are_added_up_exactly_under_autocast() -> None:
    """Also where products run in bf16; and an infinite one is that of its own document alone."""
    torch.manual_seed(0)
    nats, targets = torch.rand(2 * 64) * 5, torch.zeros(2, 64, dtype=torch.long)
    nats[3] = math.inf
    documents = torch.arange(64).div(16, rounding_mode="floor").expand(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = answer_log_probabilities(nats, targets, documents, 4)
    assert found.dtype == torch.float32
    exact = -nats.double().view(2, 4, 16).sum(2)
    assert torch.allclose(found.double(), exact, rtol=1e-6)
