"""Learning from another network: cross-entropy mixed with the distance to a teacher's distribution.

    objective = Distillation(teacher, weight=0.5, temperature=2.0)
    loss = objective(network, inputs, targets) / targets.numel()

The loss of a target is (1 - weight) x its cross-entropy + weight x temperature^2 x KL(teacher ||
student), both distributions softened by the temperature (Hinton, Vinyals and Dean, arXiv
1503.02531). The teacher's logits are made in the walk over the output layer, a chunk of tokens at a
time, so that neither network's whole logits are ever in memory.

Shapes: N tokens, n those of a chunk, C the student's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mobilellm.model.linear import linear
from mobilellm.model.loss import (
    IGNORED,
    ChunkLoss,
    Predictor,
    cross_entropy_chunk,
    output_walk,
    products_dtype,
)


class Distillation:
    """The objective of a student that sees what its teacher sees."""

    def __init__(
        self,
        teacher: Predictor,
        weight: float = 0.5,
        temperature: float = 1.0,
        z_loss: float = 0.0,
    ) -> None:
        """`teacher` has the student's vocabulary; it is not trained. `z_loss` is that of
        `NextToken`."""
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.z_loss = z_loss

    def __call__(
        self,
        network: Predictor,
        inputs: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        *beside: Tensor,
    ) -> Tensor:
        """The loss of `targets` (B, T), -100 where none, after `inputs` (B, T): the sum over those
        that count, float32. `documents` (B, T) as in `Network.hidden`, for both networks."""
        with torch.no_grad():
            taught = self.teacher.hidden(inputs, documents=documents).flatten(0, 1)
        hidden = network.hidden(inputs, documents=documents).flatten(0, 1)
        dtype = products_dtype(hidden)
        matrix = self.teacher.output_weight.detach().to(dtype)

        def teacher_logits(rows: slice) -> Tensor:
            return linear(taught[rows].to(dtype), matrix).float()

        chunk = distillation_chunk(
            targets.flatten(), teacher_logits, self.weight, self.temperature, self.z_loss
        )
        return output_walk(hidden, network.output_weight, chunk, arrays=4)


def distillation_chunk(
    targets: Tensor,
    teacher_logits: Callable[[slice], Tensor],
    weight: float,
    temperature: float,
    z_loss: float = 0.0,
) -> ChunkLoss:
    """The loss of `Distillation` for `targets` (N,); `teacher_logits(rows)` gives the teacher's
    (n, V) in float32."""

    def loss(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        counted = targets[rows] != IGNORED
        student = torch.log_softmax(logits / temperature, dim=1)
        teacher = torch.log_softmax(teacher_logits(rows) / temperature, dim=1)
        taught = teacher.exp()
        distance = (((teacher - student) * taught).sum(dim=1) * counted).sum()
        # The temperature divides the gradient twice over: once in the logits, once in how far the
        # two distributions are apart. Its square keeps the balance with the hard targets.
        value = weight * temperature**2 * distance
        gradient: Tensor | None = None
        if need_gradient:
            pull = weight * temperature * counted.unsqueeze(1)
            gradient = student.exp_().sub_(taught).mul_(pull)
        return value, gradient

    return with_cross_entropy(loss, targets, weight, z_loss)


def with_cross_entropy(
    taught: ChunkLoss, targets: Tensor, weight: float, z_loss: float = 0.0
) -> ChunkLoss:
    """What a teacher's share is in a loss, and (1 - weight) x the cross-entropy of `targets` (N,).

    `taught` sees the logits in float32, leaves them as they are, and gives a gradient of its own.
    """
    if weight == 1:
        return lambda logits, rows, need_gradient: taught(logits.float(), rows, need_gradient)
    hard = cross_entropy_chunk(targets, z_loss)

    def loss(logits: Tensor, rows: slice, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
        logits = logits.float()
        value, gradient = taught(logits, rows, need_gradient)
        hard_value, hard_gradient = hard(logits, rows, need_gradient)
        if gradient is not None and hard_gradient is not None:
            gradient.add_(hard_gradient, alpha=1 - weight)
        return value + (1 - weight) * hard_value, gradient

    return loss
