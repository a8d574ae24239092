"""A batch that doubles: its sizes, what of the data it takes, resuming, and what is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
from tests.train.runs import metrics, same_tensors

from mobilellm.data.loader import DataState
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.recipe.recipe import Recipe
from mobilellm.train import checkpoint
from mobilellm.train.inputs import batches
from mobilellm.train.start import resume, train


@pytest.fixture
def doubling(recipe: Recipe) -> Recipe:
    """Batches of 2, 4 and then 8 sequences, three steps each."""
    recipe = recipe.replace("data", sequence_length=32).replace("optimizer", warmup_steps=2)
    return recipe.replace(
        "train", steps=9, batch_tokens=256, batch_doublings=2, batch_doubling_steps=3,
        micro_batch_size=2, checkpoint_every=1, keep_checkpoints=0,
    )  # fmt: skip


SIZES = [2, 2, 2, 4, 4, 4, 8, 8, 8]


def test_tokens_of_a_recipe(doubling: Recipe) -> None:
    assert [doubling.batch_tokens(step) for step in range(9)] == [32 * n for n in SIZES]
    for steps in range(10):
        assert doubling.tokens(steps) == 32 * sum(SIZES[:steps])
        assert doubling.steps_of(doubling.tokens(steps)) == steps
    assert doubling.tokens() == 32 * sum(SIZES)
    assert doubling.steps_of(doubling.tokens() + 2560) == 19
    plain = doubling.replace("train", batch_doublings=0)
    assert (plain.tokens(), plain.steps_of(2560)) == (9 * 256, 10)


def test_every_sample_once(doubling: Recipe) -> None:
    """Two processes together take the samples that one takes, in its order."""
    data = TokenFolder.open(Path(doubling.data.path))
    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)

    def rows(recipe: Recipe, rank: int, size: int) -> list[list[list[int]]]:
        found = zip(range(9), batches(recipe, data, state, rank, size), strict=False)
        return [batch.inputs.tolist() for _, (batch, _) in found]

    one = rows(doubling, 0, 1)
    assert [len(batch) for batch in one] == SIZES
    assert [a + b for a, b in zip(rows(doubling, 0, 2), rows(doubling, 1, 2), strict=True)] == one
    plain = rows(doubling.replace("train", batch_doublings=0), 0, 1)
    flat = list(itertools.chain(*plain))
    assert list(itertools.chain(*one)) == flat[: sum(SIZES)]


def test_resumed_from_any_step(doubling: Recipe, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", doubling)
    assert whole.tokens == 32 * sum(SIZES)
    found = metrics(tmp_path / "whole")
    assert [row["tokens"] for row in found] == [doubling.tokens(n) for n in range(1, 10)]
    for kept in (2, 3, 4, 7):
        shutil.copytree(tmp_path / "whole", tmp_path / f"from-{kept}")
        for path in checkpoint.complete(tmp_path / f"from-{kept}"):
            if checkpoint.step_of(path) > kept:
                shutil.rmtree(path)
        again = resume(tmp_path / f"from-{kept}")
        assert same_tensors(whole.checkpoint, again.checkpoint)
        assert again.tokens == whole.tokens


@pytest.mark.parametrize(
    ("changes", "world", "words"),
    [
        ({"batch_doublings": 4}, 1, r"divide by 16 into .* of 32; use fewer, or .* = 512"),
        ({}, 3, r"into sequences of 32 for 3 processes; use fewer, or .* = 384"),
        ({"batch_doublings": 17}, 1, r"train.batch_doublings"),
        ({"batch_doubling_steps": 0}, 1, r"train.batch_doubling_steps"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(
    doubling: Recipe, changes: dict[str, int], world: int, words: str
) -> None:
    bad = doubling.replace("train", **changes)
    if world == 1:
        with pytest.raises(UserError, match=words):
            bad.check()
    else:
        bad.check()
        with pytest.raises(UserError, match=words):
            bad.batching(world)
