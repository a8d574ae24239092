"""Learning rates: a linear warm-up, then one of the falls in `SCHEDULES`.

    # What the peak learning rate is multiplied by, at `step` from 0.
    factor(step, steps, section)
    decay_start(steps, section)           # the first step below the peak

A new schedule is one entry: its fall, where the fall begins, and whether a run with it may be made
longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mobilellm.recipe.recipe import OptimizerSection

DEFAULT_DECAY_SHARE = 5  # of wsd without decay_steps: the last fifth of all steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A kind of schedule."""

    fall: Callable[[int, int, OptimizerSection], float]
    """(step, steps, settings) -> the share of the peak at a step after warm-up, in a run of `steps`
    steps."""
    decay_start: Callable[[int, OptimizerSection], int]
    """(steps, settings) -> the first step whose learning rate depends on `steps`; before it a run
    may still be made longer."""


def decay_steps(steps: int, section: OptimizerSection) -> int:
    """Steps over which wsd falls: as given, else a fifth of all."""
    return section.decay_steps or max(1, steps // DEFAULT_DECAY_SHARE)


def _toward_end(left: Callable[[float], float]) -> Callable[[int, int, OptimizerSection], float]:
    """A fall from the end of warm-up to the last step; `left` maps the share done to the share of
    the fall left."""

    def fall(step: int, steps: int, section: OptimizerSection) -> float:
        # The last step, steps - 1, is where the fall ends.
        warmup = section.warmup_steps
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        floor = section.final_lr_fraction
        return floor + (1 - floor) * left(progress)

    return fall


def _wsd(step: int, steps: int, section: OptimizerSection) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): the fall is linear, or 1 - sqrt(share done) (arXiv
    2405.18392)."""
    decay = decay_steps(steps, section)
    done = (step - (steps - decay) + 1) / decay  # 1 at the last step
    if done <= 0:
        return 1.0
    shape = done if section.decay_shape == "linear" else math.sqrt(done)
    return 1 - (1 - section.final_lr_fraction) * shape


SCHEDULES: dict[str, Schedule] = {
    "cosine": Schedule(
        fall=_toward_end(lambda done: 0.5 * (1 + math.cos(math.pi * done))),
        decay_start=lambda _, section: section.warmup_steps,
    ),
    "linear": Schedule(
        fall=_toward_end(lambda done: 1 - done),
        decay_start=lambda _, section: section.warmup_steps,
    ),
    "constant": Schedule(fall=lambda *_: 1.0, decay_start=lambda steps, _: steps),
    "wsd": Schedule(
        fall=_wsd, decay_start=lambda steps, section: steps - decay_steps(steps, section)
    ),
}


def factor(step: int, steps: int, section: OptimizerSection) -> float:
    """What the peak learning rate is multiplied by at `step` (from 0) of `steps`."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    return SCHEDULES[section.schedule].fall(step, steps, section)


def decay_start(steps: int, section: OptimizerSection) -> int:
    """The first step whose learning rate depends on how many there are: up to it a run may be made
    longer, or branched."""
    return SCHEDULES[section.schedule].decay_start(steps, section)


def may_be_longer(section: OptimizerSection) -> bool:
    """Whether a run with this schedule has a part that does not depend on its length."""
    return section.schedule in ("constant", "wsd")
