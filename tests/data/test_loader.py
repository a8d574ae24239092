"""Batches: every token once an epoch, resumable anywhere, the same for any number of processes."""

import numpy as np
import pytest

from mobilellm.data.loader import DataState, Loader
from mobilellm.data.stream import TokenStream
from mobilellm.errors import UserError

START = DataState(seed=5, epoch=0, samples=0, fingerprint="f")


def stream(n: int = 1000, pieces: int = 3) -> TokenStream:
    return TokenStream.of(np.array_split(np.arange(n, dtype=np.uint16), pieces))


def take(loader: Loader, count: int) -> list:
    return [pair for _, pair in zip(range(count), loader, strict=False)]


@pytest.mark.parametrize(("n", "length"), [(1000, 10), (1003, 10), (997, 32), (33, 32)])
def test_an_epoch_trains_on_each_token_once_but_for_the_remainder(n: int, length: int) -> None:
    loader = Loader(stream(n), length, 1, START)
    for epoch in range(3):
        inputs = [batch.inputs for batch, _ in take(loader, n // length)]
        seen = np.bincount(np.concatenate(inputs).ravel(), minlength=n)
        assert seen.max() == 1
        assert seen.sum() == n // length * length
        assert loader.state == DataState(seed=5, epoch=epoch + 1, samples=0, fingerprint="f")


def test_targets_are_the_next_tokens_on_the_circle() -> None:
    for batch, _ in take(Loader(stream(1000), 16, 4, START), 100):
        assert batch.inputs.dtype == batch.targets.dtype == np.int64
        assert np.array_equal(batch.targets, (batch.inputs + 1) % 1000)


def test_epochs_differ_in_order_and_in_borders() -> None:
    loader = Loader(stream(1000), 10, 100, START)
    (first, _), (second, _) = take(loader, 2)
    assert set(first.inputs[:, 0] % 10) != set(second.inputs[:, 0] % 10)
    assert not np.array_equal(np.argsort(first.inputs[:, 0]), np.argsort(second.inputs[:, 0]))


@pytest.mark.parametrize("stop", [1, 7, 40, 63])
def test_resuming_gives_the_batches_that_would_have_followed(stop: int) -> None:
    whole = take(Loader(stream(), 10, 3, START), 80)  # crosses epochs inside batches
    state = whole[stop - 1][1]
    for (a, sa), (b, sb) in zip(
        whole[stop:], take(Loader(stream(), 10, 3, state), 80 - stop), strict=True
    ):
        assert np.array_equal(a.inputs, b.inputs)
        assert sa == sb


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_same_global_batches(world: int) -> None:
    whole = take(Loader(stream(), 10, 6, START), 50)
    parts = [take(Loader(stream(), 10, 6, START, rank, world), 50) for rank in range(world)]
    for i, (batch, state) in enumerate(whole):
        assert np.array_equal(batch.inputs, np.concatenate([part[i][0].inputs for part in parts]))
        assert all(part[i][1] == state for part in parts)


def test_the_order_does_not_depend_on_how_tokens_lie_in_shards() -> None:
    for (a, _), (b, _) in zip(
        take(Loader(stream(), 10, 4, START), 60),
        take(Loader(stream(pieces=11), 10, 4, START), 60),
        strict=True,
    ):
        assert np.array_equal(a.inputs, b.inputs)


def test_seeds_give_other_orders() -> None:
    other = DataState(seed=6, epoch=0, samples=0, fingerprint="f")
    assert not np.array_equal(
        take(Loader(stream(), 10, 4, START), 1)[0][0].inputs,
        take(Loader(stream(), 10, 4, other), 1)[0][0].inputs,
    )


def test_text_shorter_than_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match="32 training tokens are less than one sample of 32"):
        Loader(stream(32), 32, 1, START)
    with pytest.raises(UserError, match="do not divide by 4 processes"):
        Loader(stream(), 10, 6, START, 0, 4)


def test_an_epoch_longer_than_a_block_of_the_order() -> None:
    """Places are worked out 256 samples at a time: across those borders, too, each token once,
    and resumable."""
    whole = take(Loader(stream(30_000), 10, 7, START), 600)
    inputs = np.concatenate([batch.inputs for batch, _ in whole])
    assert np.bincount(inputs[:3000].ravel(), minlength=30_000).max() == 1
    for stop in (146, 147, 292, 428, 430):
        again = take(Loader(stream(30_000), 10, 7, whole[stop - 1][1]), 3)
        assert all(
            np.array_equal(a.inputs, b.inputs)
            for (a, _), (b, _) in zip(whole[stop:], again, strict=False)
        )
