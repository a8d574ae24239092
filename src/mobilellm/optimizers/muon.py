"""Muon: momentum whose update is orthogonalized, for the matrices inside the blocks.

From Jordan et al. (2024, kellerjordan.github.io/posts/muon), with the update scaled as in Moonlight
(arXiv 2502.16982, section 2.2) so that AdamW's learning rates and weight decay carry over.
torch.optim.Muon walks over the parameters one by one and always iterates in bfloat16, which some
CPUs run hundreds of times slower than float32; here equal shapes go through one batched product in
the precision that the device is fast at, and a matrix stacked from several (Q, K and V, or gate and
up) is orthogonalized part by part. With `tiles`, a processor with AMX does the whole step matrix by
matrix (kernels/muon_step.py).

NorMuon (arXiv 2510.05491) then divides each row, which is what one neuron writes, by the root of
its running mean square, and gives the whole the length that it had. Cautious weight decay (arXiv
2510.12402) shrinks a weight only where the update does not make it larger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mobilellm.distributed.sharded import local, share, whole
from mobilellm.kernels import muon_step

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # quintic Newton-Schulz with the steepest slope at zero (Jordan et al.)
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix (N, rows, columns) towards 1."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-7).to(
        matrices.dtype
    )
    wide = x.shape[1] <= x.shape[2]
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT) if wide else torch.bmm(x.mT, x)  # the smaller of the two
        powers = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, powers, x, beta=a) if wide else torch.baddbmm(x, x, powers, beta=a)
    return x


def known_at_once(t: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return t.device.type == "cpu"


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters. A group's `parts` lists the row counts its parameters are stacked
    from.

    With `row_decay` above 0 it is NorMuon, whose mean squares of rows keep that share at each step;
    `cautious` is how weights decay. `tiles` is for bfloat16, float32 weights on a CPU for which
    `muon_step.fault` has nothing to say, and neither of the two; else it does nothing.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
        row_decay: float = 0.0,
        cautious: bool = False,
        tiles: bool = False,
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": None}
        )
        self.dtype, self.row_decay, self.cautious = dtype, row_decay, cautious
        self.tiles = tiles and dtype == torch.bfloat16 and not row_decay and not cautious

    def empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter, as it is before its first step. The mean squares of rows
        (rows, 1) are whole in every process."""
        found = {"momentum": torch.zeros_like(parameter)}
        if self.row_decay:
            found["row_squares"] = torch.zeros(parameter.shape[0], 1, device=parameter.device)
        return found

    found_inf: Tensor | None = None
    """1.0 to skip a step, as torch's fused optimizers have it: on the device, so that the host need
    not know."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; with `found_inf` 1 nothing changes."""
        given = [
            (group, parameter, group["parts"] or [parameter.shape[0]])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for _, parameter, _ in given:
            if not self.state[parameter]:
                self.state[parameter].update(self.empty_state(parameter))
        keep = None if self.found_inf is None else 1 - self.found_inf
        if keep is not None and known_at_once(keep):
            if not keep:
                return
            keep = None
        if self.tiles and keep is None:
            given = self._step_in_tiles(given)
        if not given:
            return
        # Parts of one shape are orthogonalized together: their directions lie in one tensor.
        shapes: dict[tuple[int, int], list[_Part]] = defaultdict(list)
        counts = Counter((rows, p.shape[1]) for _, p, parts in given for rows in parts)
        directions = {
            shape: torch.empty(count, *shape, dtype=self.dtype, device=given[0][1].device)
            for shape, count in counts.items()
        }
        apart: list[tuple[Tensor, Tensor, float | Tensor]] = []
        for group, parameter, parts in given:
            state = self.state[parameter]
            gradient, momentum, weight = (
                local(parameter.grad),
                local(state["momentum"]),
                local(parameter),
            )
            amount, decay = 1 - group["momentum"], group["lr"] * group["weight_decay"]
            if keep is not None:
                gradient.masked_fill_(keep == 0, 0.0)  # NaN times 0 would stay NaN
                decay = decay * keep
            momentum.lerp_(gradient, amount if keep is None else amount * keep)
            moved = gradient.lerp(momentum, group["momentum"])  # Nesterov
            sharded = weight is not parameter
            if sharded:  # orthogonalizing needs whole matrices
                moved = whole(moved, parameter)
            if not self.cautious:
                weight.mul_(1 - decay)
            if sharded or self.cautious:
                weight = torch.zeros_like(moved)
                apart.append((parameter, weight, decay))
            squares = state["row_squares"].split(parts) if self.row_decay else [None] * len(parts)
            for part, direction, row_squares in zip(
                weight.split(parts), moved.split(parts), squares, strict=True
            ):
                entries = shapes[part.shape[0], part.shape[1]]
                directions[part.shape][len(entries)].copy_(direction)
                entries.append(_Part(part, group["lr"], row_squares))
        for shape, entries in shapes.items():
            updates = orthogonalize(directions.pop(shape))
            if keep is not None:
                updates.mul_(keep)
            for entry, update in zip(entries, updates, strict=True):
                scale = -_scale(entry.lr, update.shape)
                if entry.squares is not None:
                    update = self._by_row(update, entry.squares, keep)
                entry.weight.add_(update, alpha=scale)
        for parameter, change, decay in apart:
            weight, change = local(parameter), share(change, parameter)
            if self.cautious:
                weight.mul_(1 - decay * (weight * change < 0))
            weight.add_(change)

    def _step_in_tiles(self, given: list[_Given]) -> list[_Given]:
        """The step of those parameters that lie here whole; returns the others."""
        others: list[_Given] = []
        moved: list[muon_step.Moved] = []
        for group, parameter, parts in given:
            momentum = self.state[parameter]["momentum"]
            assert parameter.grad is not None
            tensors = (parameter.grad, momentum, parameter)
            if any(local(t) is not t or not t.is_contiguous() for t in tensors):
                others.append((group, parameter, parts))
                continue
            for gradient, mean, weight in zip(*(t.split(parts) for t in tensors), strict=True):
                moved.append(
                    muon_step.Moved(
                        gradient,
                        mean,
                        weight,
                        amount=1 - group["momentum"],
                        kept=1 - group["lr"] * group["weight_decay"],
                        scale=_scale(group["lr"], weight.shape),
                    )
                )
        muon_step.step(moved, COEFFICIENTS, ITERATIONS)
        return others

    def _by_row(self, update: Tensor, squares: Tensor, keep: Tensor | None) -> Tensor:
        """NorMuon's update (rows, columns) of an orthogonalized one, of the same length; `squares`
        (rows, 1) take it in."""
        update = update.float()
        amount = 1 - self.row_decay
        mean = update.square().mean(dim=1, keepdim=True)
        squares.lerp_(mean, amount if keep is None else amount * keep)
        even = update / squares.sqrt().clamp(min=1e-8)
        return even.mul_(update.norm() / even.norm().clamp(min=1e-8))


def _scale(lr: float, shape: torch.Size) -> float:
    """Of an orthogonal update, to the RMS of AdamW's (Moonlight)."""
    return lr * 0.2 * float(max(shape)) ** 0.5


_Given = tuple[dict[str, Any], Tensor, list[int]]
"""A parameter with its group, and the rows of its parts."""


class _Part(NamedTuple):
    """A matrix that is orthogonalized by itself."""

    weight: Tensor
    """Where its update goes, (rows, columns)."""
    lr: float
    squares: Tensor | None
