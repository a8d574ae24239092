"""What verbs that run a model share: the flag of its precision, opening it, and how it is sampled.

with opened(self.model, self.runtime, self.threads, self.precision) as model:
    ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mobilellm.model.precision import Precision
from mobilellm.terminal.output import say

if TYPE_CHECKING:
    from mobilellm.model.generation import Sampling
    from mobilellm.runtimes.running import RunningModel

PrecisionFlag = Annotated[Precision | None, tyro.conf.EnumChoicesFromValues]


@contextlib.contextmanager
def opened(
    path: Path, runtime: str | None, threads: int | None, precision: Precision | None
) -> Iterator[RunningModel]:
    """A model file, running; what a user should know of how it runs is said first."""
    from mobilellm.runtimes.running import open_model

    with open_model(path, runtime, threads=threads, precision=precision) as model:
        for note in model.notes:
            say(f"note: {note}")
        yield model


def sampling_of(
    path: Path,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    *,
    seed: int,
    usual_temperature: float,
) -> Sampling:
    """How tokens are drawn: as flags say, else as the model's files do, else at the usual
    temperature among the tokens that make up 0.95."""
    from mobilellm.interop.load import sampling_defaults
    from mobilellm.model.generation import Sampling

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    own = sampling_defaults(path) or {"temperature": usual_temperature, "top_p": 0.95}
    return Sampling(**own | {k: v for k, v in given.items() if v is not None}, seed=seed)
