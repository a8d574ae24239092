"""Fixtures of the training tests. What they read of a run is in runs.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.train.runs import Listener

from mobilellm.recipe.recipe import (
    DataSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    TrainSection,
)
from mobilellm.train import loop


@pytest.fixture(scope="session", autouse=True)
def _one_peak() -> Iterator[None]:
    """The machine's peak is measured once, not by each of hundreds of runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "peak_flops", functools.cache(loop.peak_flops))
        yield


@pytest.fixture
def recipe(small_data: Path) -> Recipe:
    """A run of 24 steps of 4 sequences, each of 32 tokens: about a second."""
    return Recipe(
        model=ModelSection(preset="1M", override={"num_hidden_layers": 2}),
        data=DataSection(path=str(small_data), sequence_length=32),
        train=TrainSection(
            steps=24,
            batch_tokens=128,
            precision="fp32",
            compile="off",
            products="torch",
            attention="torch",
            evaluate_every=8,
            checkpoint_every=5,
            log_every=3,
        ),
        optimizer=OptimizerSection(warmup_steps=4, learning_rate=3e-3),
    )


@pytest.fixture
def listener() -> Listener:
    """A watcher whose `lines` are what the run said."""
    return Listener()
