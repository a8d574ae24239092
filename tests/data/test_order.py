"""The computed permutation: a bijection for every size, and no visible pattern."""

import numpy as np
import pytest

from mobilellm.data.order import derive_key, permute


@pytest.mark.parametrize(
    "n", [*range(1, 200), 255, 256, 257, 1009, 4095, 4096, 4097, 65_537, 100_000]
)
def test_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key=n)), np.arange(n))


def test_any_part_can_be_computed_alone() -> None:
    whole = permute(np.arange(5000), 5000, 7)
    assert np.array_equal(permute(np.arange(1234, 2345), 5000, 7), whole[1234:2345])


def test_sizes_beyond_any_table() -> None:
    n = (1 << 40) + 12345
    values = permute(np.arange(10_000) * 100_003, n, 3)
    assert len(set(values.tolist())) == 10_000
    assert values.min() >= 0
    assert values.max() < n


def test_keys_give_unrelated_orders() -> None:
    n = 20_000
    orders = [permute(np.arange(n), n, derive_key(seed, 0)) for seed in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 5 / n * 2
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_passes_what_numpys_permutation_passes() -> None:
    """Neighbours' correlation, displacement, cycle count and the spread over a grid stand within
    numpy's own range."""
    n, trials = 4096, 60

    def measures(order: np.ndarray) -> list[float]:
        grid = np.histogram2d(np.arange(n), order, bins=16)[0]
        steps = np.diff(order)
        seen, cycles = np.zeros(n, bool), 0
        for start in range(n):
            if not seen[start]:
                cycles += 1
                while not seen[start]:
                    seen[start] = True
                    start = order[start]
        return [
            np.corrcoef(order[:-1], order[1:])[0, 1],
            np.corrcoef(np.arange(n), order)[0, 1],
            ((grid - n / 256) ** 2).sum() / (n / 256),
            (steps > 0).mean(),
            float((steps == 1).sum()),
            float(cycles),
        ]

    rng = np.random.default_rng(0)
    ours = np.array(
        [measures(permute(np.arange(n), n, derive_key("trial", i))) for i in range(trials)]
    )
    theirs = np.array([measures(rng.permutation(n)) for _ in range(trials)])
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / trials)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4.5 * error).all()
    ratio = ours.std(axis=0) / theirs.std(axis=0)
    assert ((ratio > 0.55) & (ratio < 1.8)).all()


def test_keys_tell_their_parts_apart() -> None:
    """Seed 1 in epoch 23 is not seed 12 in epoch 3."""
    parts = [(1, 23), (12, 3), (123,), (1, 2, 3), ("1", "23", "")]
    assert len({derive_key(*each) for each in parts}) == len(parts)
