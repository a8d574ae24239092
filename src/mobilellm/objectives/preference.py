"""Direct preference optimization: of two answers, the chosen one is to become the likelier.

    objective = Preference(beta=0.5)
    loss = objective(network, inputs, targets, documents, reference) / pairs

The loss of a pair is -log sigmoid(beta x (c - r)), where c and r say how much likelier the chosen
and the rejected answer are to the network than to the reference (Rafailov et al., arXiv 2305.18290,
equation 7). The reference's log-probabilities come with the batch: they were computed once, so that
no second network is in memory.

Every row holds pairs, one after the other: documents 0 and 1 are the first pair's chosen and
rejected answer with what was asked before them, 2 and 3 the second's. Shapes: B rows of T tokens, D
documents in the fullest row, an even number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilellm.model.loss import (
    ChunkLoss,
    Predictor,
    cross_entropy_chunk,
    linear_cross_entropy,
    output_walk,
)

MARGIN, ACCURACY = "reward_margin", "reward_accuracy"


class Preference:
    """The loss of pairs of answers, summed over pairs."""

    def __init__(self, beta: float) -> None:
        """`beta` is how strongly the network is held to the reference: the smaller, the less."""
        self.beta = beta
        self._sums: list[Tensor] = []

    def __call__(
        self,
        network: Predictor,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """The sum over pairs, float32, for `targets` (B, T) after `inputs` (B, T), of `documents`
        (B, T); `beside` is the log-probabilities of the answers by the reference, (B, D).

        Without them every answer has the reference's zero: so a step's memory is tried out.
        """
        if documents is None:
            documents = torch.zeros_like(inputs)
        reference = beside[0] if beside else torch.zeros(len(inputs), 2, device=inputs.device)
        hidden = network.hidden(inputs, documents=documents).flatten(0, 1)
        weight, flat = network.output_weight, targets.flatten()
        with torch.no_grad():
            nats = linear_cross_entropy(hidden.detach(), weight.detach(), flat, "none")
            answers = answer_log_probabilities(nats, targets, documents, reference.shape[1])
            margin, there = margins(self.beta, answers, reference, documents)
            value = (F.softplus(-margin) * there).sum()
            # d loss / d (a token's nats): up for the tokens of the chosen answer, down for the
            # rejected one's, more where the pair is on the wrong side.
            pull = self.beta * torch.sigmoid(-margin) * there
            by_document = torch.stack((pull, -pull), dim=2).flatten(1)  # (B, D)
            by_token = by_document.gather(1, documents.long()).flatten()
            self._sums.append(
                torch.stack(((margin * there).sum(), ((margin > 0) & there).sum().float()))
            )
        walked = output_walk(hidden, weight, weighted_chunk(flat, by_token))
        return walked + (value - walked.detach())

    def counted(self, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Pairs in a batch."""
        if documents is None:
            return torch.tensor(len(targets), device=targets.device)
        return ((documents[:, -1] + 1) // 2).sum()

    def figures(self) -> dict[str, Tensor]:
        """How far the chosen answers' rewards are above the rejected ones', and how many are above
        them; sums over the pairs since this was last asked."""
        if not self._sums:
            return {}
        margin, right = torch.stack(self._sums).sum(dim=0)
        self._sums = []
        return {MARGIN: margin, ACCURACY: right}


def answer_log_probabilities(
    nats: Tensor, targets: Tensor, documents: Tensor, width: int
) -> Tensor:
    """The log-probability of each document's trained tokens, (B, width), from the nats of all
    targets (B T,), which are 0 where none counts."""
    # Not scatter_add: a GPU adds in any order there, and each would have other last bits.
    numbers = torch.arange(width, device=nats.device)
    belongs = documents.unsqueeze(2) == numbers  # (B, T, width)
    return torch.where(belongs, -nats.float().view_as(targets).unsqueeze(2), 0.0).sum(dim=1)


def margins(
    beta: float, answers: Tensor, reference: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor]:
    """How far the reward of each chosen answer is above the rejected one's, (B, D/2), and which of
    these pairs a row holds; of log-probabilities by the network and the reference, (B, D)."""
    rewards = (beta * (answers - reference)).unflatten(1, (-1, 2))  # (B, D/2, 2)
    margin = rewards[..., 0] - rewards[..., 1]
    numbers = torch.arange(margin.shape[1], device=documents.device)
    return margin, numbers < ((documents[:, -1:] + 1) // 2)


def weighted_chunk(targets: Tensor, weights: Tensor) -> ChunkLoss:
    """Cross-entropy whose gradient is multiplied, at each target (N,), by its weight (N,)."""
    plain = cross_entropy_chunk(targets)

    def loss(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        value, gradient = plain(logits, rows, need_gradient)
        if gradient is not None:
            gradient.mul_(weights[rows].unsqueeze(1).to(gradient.dtype))
        return value, gradient

    return loss
