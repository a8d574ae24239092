"""The spike guard by itself: its statistics are those of a plain formula, and each of its two
numbers can rule a step out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobilellm.optimizers.guard import FIRST, MEMORY, Guard


def fed(count: int, deviations: float = 5.0) -> tuple[Guard, np.ndarray]:
    """A guard that has taken `count` steps, and their losses and norms, (count, 2)."""
    values = np.random.default_rng(0).uniform(0.9, 1.1, (count, 2)) * [4.0, 0.5]
    guard = Guard(torch.device("cpu"), deviations)
    for loss, norm in values:
        assert not guard.check(torch.tensor(loss), torch.tensor(norm))
    return guard, values


@pytest.mark.parametrize("count", [1, 2, 30, 200])
def test_its_statistics_are_numpys(count: int) -> None:
    """A plain mean and variance at first; from the 50th step on the newest has a weight of 0.02."""
    guard, values = fed(count)
    weights = np.ones(1)
    for number in range(1, count):
        weight = max(1 / (number + 1), MEMORY)
        weights = np.append(weights * (1 - weight), weight)
    mean = weights @ values
    variance = weights @ (values - mean) ** 2
    assert guard.state.tolist() == pytest.approx(
        [count, mean[0], variance[0], mean[1], variance[1]]
    )
    if count <= 1 / MEMORY:
        assert mean == pytest.approx(values.mean(axis=0))
        assert variance == pytest.approx(values.var(axis=0))


@pytest.mark.parametrize(("loss", "norm"), [(4.0, 5.0), (40.0, 0.5)])
def test_a_spike_of_either_is_skipped(loss: float, norm: float) -> None:
    guard, _ = fed(FIRST)
    before = guard.state.clone()
    assert guard.check(torch.tensor(loss), torch.tensor(norm))
    assert torch.equal(guard.state, before)
    assert not guard.check(torch.tensor(4.0), torch.tensor(0.5))
    assert guard.state[0] == FIRST + 1


def test_the_threshold_counts_standard_deviations() -> None:
    guard, values = fed(FIRST, deviations=5.0)
    for share, skipped in ((4.9, False), (5.1, True)):
        loss = torch.tensor(values[:, 0].mean() + share * values[:, 0].std())
        again = Guard(torch.device("cpu"), 5.0)
        again.state = guard.state.clone()
        assert bool(again.check(loss, torch.tensor(0.5))) is skipped
