"""Learning from what a teacher said of the data once: its likeliest tokens, and the rest as one.

    objective = CachedDistillation(weight=0.5)
    loss = objective(network, inputs, targets, documents, ids, log_probabilities) / targets.numel()

The loss of a target is (1 - weight) x its cross-entropy + weight x temperature^2 x KL(teacher ||
student) over k + 1 outcomes: the k tokens that were kept, and one that stands for all others. So
the target stays a distribution, whatever k is; the distance is never above that of the whole
distributions, and equal to it where k is the vocabulary. The gradient is computed in the walk over
the output layer.

Shapes: B rows of T tokens, N = B T, n those of a chunk, k tokens kept, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilellm.model.loss import (
    IGNORED,
    ChunkLoss,
    NextToken,
    Predictor,
    output_walk,
)
from mobilellm.objectives.distillation import with_cross_entropy


class CachedDistillation:
    """The objective of a student whose teacher was asked before."""

    def __init__(self, weight: float = 0.5, temperature: float = 1.0, z_loss: float = 0.0) -> None:
        """`temperature` is the one that the teacher's probabilities were softened by; `z_loss` is
        that of `NextToken`."""
        self.weight, self.temperature, self.z_loss = weight, temperature, z_loss

    def __call__(
        self,
        network: Predictor,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """The loss of `targets` (B, T), -100 where none, after `inputs` (B, T): the sum over those
        that count, float32.

        `beside` is the ids that were kept, (B, T, k), and the log-probabilities of these and, last,
        of all others together, (B, T, k + 1). Without it, as when a step's memory is tried out, it
        is the cross-entropy.
        """
        if not beside:
            return NextToken(self.z_loss)(network, inputs, targets, documents)
        ids, log_probabilities = (part.flatten(0, 1) for part in beside)
        hidden = network.hidden(inputs, documents=documents).flatten(0, 1)
        chunk = tail_chunk(
            targets.flatten(), ids, log_probabilities, self.weight, self.temperature, self.z_loss
        )
        return output_walk(hidden, network.output_weight, chunk, arrays=4)


def tail_chunk(
    targets: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    weight: float,
    temperature: float,
    z_loss: float = 0.0,
) -> ChunkLoss:
    """The loss of `CachedDistillation` for `targets` (N,), `ids` (N, k) and `log_probabilities` (N,
    k + 1)."""

    def loss(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        counted = targets[rows] != IGNORED
        index = ids[rows].long()
        log_taught = torch.log_softmax(log_probabilities[rows].float(), dim=1)  # (n, k + 1)
        taught = log_taught.exp()
        student = torch.log_softmax(logits / temperature, dim=1)  # (n, V)
        kept = student.gather(1, index)
        gradient = student.exp_().scatter_(1, index, 0.0)
        rest = gradient.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        log_student = torch.cat((kept, rest.log()), dim=1)
        apart = torch.where(taught != 0, taught * (log_taught - log_student), 0.0)
        value = weight * temperature**2 * (apart.sum(dim=1) * counted).sum()
        if need_gradient:
            # d KL / d logit: p - t of a token that was kept; p (1 - t_rest / p_rest) of the others.
            gradient.mul_(1 - taught[:, -1:] / rest)
            gradient.scatter_(1, index, kept.exp() - taught[:, :-1])
            gradient.mul_(weight * temperature * counted.unsqueeze(1))
        return value, gradient if need_gradient else None

    return with_cross_entropy(loss, targets, weight, z_loss)
