"""Mixtures: shares by tokens, each sample once an epoch, stages, resumable, the same for any
number of processes."""

import json
from itertools import pairwise

import numpy as np
import pytest

from mobilellm.data.loader import DataState, Loader
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.stream import TokenStream
from mobilellm.errors import UserError

START = DataState(seed=5, epoch=0, samples=0, fingerprint="f")


def streams() -> dict[str, TokenStream]:
    """Tokens that tell which source they are of: a from 0, b from 10,000, c from 20,000."""
    sizes = {"a": 1000, "b": 330, "c": 2000}
    return {
        name: TokenStream.of(
            np.array_split(np.arange(base, base + sizes[name], dtype=np.uint16), 3)
        )
        for base, name in ((0, "a"), (10_000, "b"), (20_000, "c"))
    }


def mixture(
    state: DataState = START, stages: list[Stage] | None = None, batch: int = 6, **rest: int
) -> Mixture:
    stages = stages or [Stage(until_tokens=None, weights={"a": 0.5, "b": 0.3, "c": 0.2})]
    return Mixture(streams(), stages, 10, batch, state, **rest)


def take(loader: Mixture | Loader, count: int) -> list:
    return [pair for _, pair in zip(range(count), loader, strict=False)]


def test_shares_are_right_to_a_sample_at_every_moment() -> None:
    counts, taken = np.zeros(3), 0
    for batch, _ in take(mixture(), 300):
        counts += np.bincount(batch.inputs[:, 0] // 10_000, minlength=3)
        taken += 6
        assert np.abs(counts - taken * np.array([0.5, 0.3, 0.2])).max() <= 1


def test_each_sample_of_a_source_once_an_epoch() -> None:
    counts = np.zeros(30_000, dtype=int)
    state = START
    for batch, state in take(mixture(), 400):
        np.add.at(counts, batch.inputs.ravel(), 1)
        for base, name, size in ((0, "a", 1000), (10_000, "b", 330), (20_000, "c", 2000)):
            assert np.ptp(counts[base : base + size]) <= 1
            assert state.sources[name].epoch == counts[base : base + size].min()
    assert counts.sum() == 400 * 6 * 10 == state.tokens
    assert state.epochs() == pytest.approx(
        {"a": 1200 / 100, "b": 720 / 33, "c": 480 / 200}, abs=0.06
    )


def test_one_source_gives_the_batches_of_a_loader_and_takes_over_its_position() -> None:
    stream = streams()["a"]
    plain = take(Loader(stream, 10, 6, START), 40)
    for state, skip in ((START, 0), (plain[19][1], 20)):
        mixed = take(
            Mixture({"a": stream}, [Stage(until_tokens=None, weights={"a": 3})], 10, 6, state),
            40 - skip,
        )
        for (a, sa), (b, sb) in zip(plain[skip:], mixed, strict=True):
            assert np.array_equal(a.inputs, b.inputs)
            assert np.array_equal(a.targets, b.targets)
            assert (sa.epoch, sa.samples) == (sb.epoch, sb.samples)
    assert mixed[-1][1].tokens == 40 * 60


STAGES = [
    Stage(until_tokens=900, weights={"a": 1, "b": 1}),
    Stage(until_tokens=3000, weights={"b": 0.25, "c": 0.75}),
    Stage(until_tokens=None, weights={"a": 2, "c": 0}),
]


@pytest.mark.parametrize("stop", [1, 15, 29, 51, 77])
def test_resuming_from_json_gives_the_batches_that_would_have_followed(stop: int) -> None:
    whole = take(mixture(stages=STAGES), 100)
    state = DataState.from_dict(json.loads(json.dumps(whole[stop - 1][1].to_dict())))
    assert state == whole[stop - 1][1]
    for (a, sa), (b, sb) in zip(
        whole[stop:], take(mixture(state, STAGES), 100 - stop), strict=True
    ):
        assert np.array_equal(a.inputs, b.inputs)
        assert sa == sb


def test_stages_change_the_weights_at_their_token() -> None:
    firsts = np.concatenate(
        [batch.inputs[:, 0] // 10_000 for batch, _ in take(mixture(stages=STAGES), 100)]
    )
    assert set(firsts[:90]) == {0, 1}
    assert abs((firsts[:90] == 0).sum() - 45) <= 1
    assert set(firsts[90:300]) == {1, 2}
    assert abs((firsts[90:300] == 2).sum() - 157.5) <= 2
    assert set(firsts[300:]) == {0}


def test_weights_may_change_in_the_middle_without_repeating_a_sample() -> None:
    before = take(mixture(), 10)
    other = [Stage(until_tokens=None, weights={"a": 0.1, "c": 0.9})]
    after = take(mixture(before[-1][1], other), 10)
    rows = [int(row[0]) for batch, _ in before + after for row in batch.inputs if row[0] < 10_000]
    assert len(rows) == len(set(rows)) == 30 + 6
    assert after[-1][1].sources["b"] == before[-1][1].sources["b"]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_same_global_batches(world: int) -> None:
    whole = take(mixture(stages=STAGES), 80)
    parts = [take(mixture(stages=STAGES, rank=rank, world_size=world), 80) for rank in range(world)]
    for i, (batch, state) in enumerate(whole):
        assert np.array_equal(batch.inputs, np.concatenate([part[i][0].inputs for part in parts]))
        assert all(part[i][1] == state for part in parts)


def test_no_place_in_the_batch_belongs_to_a_source() -> None:
    firsts = np.array([batch.inputs[:, 0] // 10_000 for batch, _ in take(mixture(), 400)])
    assert all(0.4 < (firsts[:, place] == 0).mean() < 0.6 for place in range(6))


def test_old_positions_load() -> None:
    assert (
        DataState.from_dict({"seed": 1, "epoch": 2, "samples": 3, "fingerprint": "x"}).epochs()
        == {}
    )


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "no stage"),
        ([Stage(until_tokens=None, weights={"wiki": 1})], "stage 1: unknown source 'wiki'"),
        ([Stage(until_tokens=None, weights={"a": 0})], "no source has a weight"),
        ([Stage(until_tokens=None, weights={"a": -1, "b": 2})], "the weight of 'a' is -1"),
        ([Stage(until_tokens=None, weights={"a": float("nan")})], "nan"),
        (
            [
                Stage(until_tokens=None, weights={"a": 1}),
                Stage(until_tokens=None, weights={"a": 1}),
            ],
            "stage 1: has no until_tokens",
        ),
        (
            [Stage(until_tokens=50, weights={"a": 1}), Stage(until_tokens=50, weights={"a": 1})],
            "must be above 50",
        ),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages: list[Stage], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mixture(streams(), stages, 10, 6, START)


def test_a_position_of_another_length_is_refused() -> None:
    state = take(mixture(), 3)[-1][1]
    with pytest.raises(UserError, match="source 'a' had 100 samples"):
        Mixture(streams(), [Stage(until_tokens=None, weights={"a": 1})], 20, 6, state)
    with pytest.raises(UserError, match="one in a single source"):
        mixture(DataState(seed=5, epoch=1, samples=4, fingerprint="f"))


def documents() -> TokenStream:
    """Shards of documents whose tokens are their number; the second shard begins with an end
    right away."""
    sizes = [[3, 9, 1, 7], [1, 2, 30], [5, 5]]
    number, parts, ends = 0, [], []
    for shard in sizes:
        parts.append(
            np.concatenate(
                [np.full(size, number + i, dtype=np.uint16) for i, size in enumerate(shard)]
            )
        )
        ends.append(np.cumsum(shard).astype(np.uint64))
        number += len(shard)
    return TokenStream.of(parts, ends)


def test_documents_are_numbered_within_each_row() -> None:
    stream = documents()
    loader = Loader(stream, 8, 4, START, mask_documents=True)
    for batch, _ in take(loader, 30):
        assert batch.documents is not None
        assert batch.documents.dtype == np.int32
        for tokens, numbers in zip(batch.inputs, batch.documents, strict=True):
            changes = (np.diff(tokens) != 0).astype(int)
            assert numbers[0] == 0
            assert np.array_equal(np.diff(numbers), changes)
    assert take(Loader(stream, 8, 4, START), 1)[0][0].documents is None
    mixed = Mixture(
        {"x": stream},
        [Stage(until_tokens=None, weights={"x": 1})],
        8,
        4,
        START,
        mask_documents=True,
    )
    for (a, _), (b, _) in zip(
        take(Loader(stream, 8, 4, START, mask_documents=True), 20), take(mixed, 20), strict=True
    ):
        assert np.array_equal(a.documents, b.documents)


@pytest.mark.parametrize(
    ("row", "length", "pieces"),
    [(2049, 2048, 1), (2049, 1024, 2), (2048, 1024, 2), (2048, 2047, 1), (11, 5, 2)],
)
def test_rows_are_never_cut_across(row: int, length: int, pieces: int) -> None:
    rows = 7
    stream = TokenStream.of([np.repeat(np.arange(rows, dtype=np.uint16), row)], row=row)
    loader = Loader(stream, length, 1, START)
    assert loader.samples_per_epoch == rows * pieces
    seen = []
    for batch, _ in take(loader, rows * pieces):
        assert len(set(batch.inputs[0]) | set(batch.targets[0])) == 1
        seen.append(int(batch.inputs[0, 0]))
    assert sorted(seen) == sorted(list(range(rows)) * pieces)
    inside = TokenStream.of([np.tile(np.arange(row, dtype=np.uint16), rows)], row=row)
    targets = np.concatenate(
        [
            batch.targets.ravel()
            for batch, _ in take(Loader(inside, length, 1, START), rows * pieces)
        ]
    )
    assert set(targets) == set(range(1, row))  # every token but a row's first is trained on
    assert all(
        b - a == 1
        for batch, _ in take(Loader(inside, length, 1, START), 5)
        for a, b in pairwise(batch.inputs[0])
    )


def test_rows_that_do_not_fit_name_what_fits() -> None:
    with pytest.raises(
        UserError,
        match=r"have 2048 ids and cannot be cut into sequences of 2048; set .* 1024, 2047",
    ):
        Loader(TokenStream.of([np.zeros(4096, np.uint16)], row=2048), 2048, 1, START)
