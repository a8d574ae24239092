"""Milliseconds a token of shapes that were never measured: an additive model of a device profile.

    model = LatencyModel.fit(read_profile(Path("device/profile.json")))
    model.milliseconds(config), model.error         # how far it is off on unseen shapes

A token costs a constant, something for each applied block, something for each weight that is read,
and something for each weight that is applied (a shared block is read once and applied twice).
Weights beyond what the caches hold cost more: a fifth price, where the profile shows that there is
such a place. The prices are fitted to the files of a profile; none is below zero. How far the model
is off is measured by leaving out each file in turn and predicting it from the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mobilellm.errors import UserError, unknown_name
from mobilellm.interop.repeats import unrolled_config
from mobilellm.model.config import ModelConfig
from mobilellm.profiling.bytes_read import model_facts
from mobilellm.profiling.device_profile import DeviceProfile, read_profile
from mobilellm.runtimes.table import RUNTIMES

TERMS = ("constant", "executed_layers", "read_parameters", "applied_parameters")
FAR = "far_parameters"
"""Weights that are read from behind the caches, once more priced."""
MIN_FAR = 2
"""Shapes that must lie on either side of the place where this begins."""
MIN_GAIN = 0.5
"""What that price must leave of the squared errors, or less, to be taken."""
MIN_SHAPES = 4
"""Different shapes that a profile must hold."""

EXACT = 1e-4
"""Relative error below which there is nothing left to explain."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A file of a profile, as the model sees it."""

    name: str
    facts: dict[str, float]
    milliseconds: float
    """A token, median."""
    bytes: int


@dataclass(frozen=True)
class Prices:
    """What a token costs."""

    terms: dict[str, float]
    """Milliseconds for each of TERMS and of FAR."""
    near: float = math.inf
    """Weights from which on further ones are FAR."""

    def predicted(self, facts: dict[str, Any]) -> float:
        """Milliseconds a token of a network of these facts."""
        amounts = _amounts(facts, self.near)
        return math.fsum(self.terms[term] * n for term, n in zip(_NAMES, amounts, strict=True))


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Prices of one runtime on one device."""

    device: str
    runtime: str
    prices: Prices
    bytes_per_parameter: float
    """Of the measured files."""
    left_out: dict[str, float]
    """File -> predicted from the others, over measured, less one."""

    @property
    def error(self) -> float:
        """Mean size of the error on files that the prices were not fitted to."""
        return statistics.fmean(abs(off) for off in self.left_out.values())

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(abs(off) for off in self.left_out.values())

    @classmethod
    def fit(cls, profile: DeviceProfile, runtime: str = "", where: str = "profile") -> LatencyModel:
        """The prices of a profile's `runtime`, which must be named where it has several.

        `UserError` for an unknown runtime, and for a profile with too few shapes.
        """
        names = sorted({row["runtime"] for row in profile["rows"] if row["error"] is None})
        if runtime and runtime not in names:
            raise unknown_name("runtime", runtime, names, where)
        if not runtime and len(names) > 1:
            raise UserError(
                f"{where}: has figures of {', '.join(names)}", hint="choose one with --runtime"
            )
        rows = measured(profile, runtime or (names[0] if names else ""))
        shapes = {tuple(row.facts.values()) for row in rows}
        if len(shapes) < MIN_SHAPES:
            raise UserError(
                f"{where}: {len(shapes)} different shapes, {MIN_SHAPES} or more are needed",
                hint="write some with `mobilellm search --shapes FOLDER` and profile them",
            )
        off = {}
        for row in rows:
            others = [other for other in rows if other.facts != row.facts]
            off[row.name] = _prices(others).predicted(row.facts) / row.milliseconds - 1
        return cls(
            device=str(profile["machine"].get("device", "an unknown device")),
            runtime=runtime or names[0],
            prices=_prices(rows),
            bytes_per_parameter=statistics.median(r.bytes / r.facts["parameters"] for r in rows),
            left_out=off,
        )

    def milliseconds(self, config: ModelConfig) -> float:
        """A token of a network of this shape."""
        return self.prices.predicted(model_facts(self._as_stored(config)))

    def megabytes(self, config: ModelConfig) -> float:
        """Its file, in 10^6 bytes, stored as the measured ones."""
        return self.bytes_per_parameter * model_facts(self._as_stored(config))["parameters"] / 1e6

    def _as_stored(self, config: ModelConfig) -> ModelConfig:
        """The configuration that a file for this runtime has: shared blocks unrolled where it
        cannot hold them once."""
        known = RUNTIMES.get(self.runtime)
        return config if known is None or known.keeps_repeats else unrolled_config(config)


class Forecast(TypedDict):
    """What a network will take on a device, in one runtime."""

    device: str
    runtime: str
    milliseconds: float
    """A token."""
    megabytes: float
    """Its file, in 10^6 bytes."""
    error: float
    """Mean size of the model's error on files that it was not fitted to, as a share."""


def forecasts(path: Path, config: ModelConfig) -> list[Forecast]:
    """What a network of this shape will take by each runtime of the device profile at `path`.

    `UserError` when the profile cannot be read, or holds too few shapes.
    """
    profile = read_profile(path)
    names = sorted({row["runtime"] for row in profile["rows"] if row["error"] is None})
    models = [LatencyModel.fit(profile, name, str(path)) for name in names or [""]]
    return [
        Forecast(
            device=model.device,
            runtime=model.runtime,
            milliseconds=model.milliseconds(config),
            megabytes=model.megabytes(config),
            error=model.error,
        )
        for model in models
    ]


def measured(profile: DeviceProfile, runtime: str) -> list[Measured]:
    """The files of a profile that tell their shape and were measured in a runtime."""
    found = []
    for row in profile["rows"]:
        facts, figure = row["model"], row["figures"].get("token_ms_p50")
        if row["runtime"] != runtime or facts is None or figure is None:
            continue
        wanted = ("parameters", *TERMS[1:])
        if all(_is_count(facts.get(key)) for key in wanted) and figure["median"] > 0:
            found.append(
                Measured(
                    name=row["name"],
                    facts={key: float(facts[key]) for key in wanted},
                    milliseconds=figure["median"],
                    bytes=row["bytes"],
                )
            )
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


_NAMES = (*TERMS, FAR)


def _amounts(facts: dict[str, Any], near: float) -> list[float]:
    """How much of each of TERMS, and of FAR, a shape has."""
    far = max(0.0, float(facts["read_parameters"]) - near)
    return [1.0, *(float(facts[key]) for key in TERMS[1:]), far]


def _prices(rows: Sequence[Measured]) -> Prices:
    """Prices with the least squared relative errors. The place from which weights are far is that
    of a measured shape, and there is none where that explains little."""
    best, error = _fitted(rows, math.inf)
    weights = sorted({row.facts["read_parameters"] for row in rows})
    if len(weights) <= len(_NAMES) or error < len(rows) * EXACT**2:
        return best
    limit = MIN_GAIN * error
    for near in weights[MIN_FAR - 1 : -MIN_FAR]:
        found, off = _fitted(rows, near)
        if off < min(limit, error):
            best, error = found, off
    return best


def _fitted(rows: Sequence[Measured], near: float) -> tuple[Prices, float]:
    """The prices where weights beyond `near` are far, and the squared relative errors of them; a
    price that would be below zero is zero."""
    time = np.array([row.milliseconds for row in rows])
    amounts = np.array([_amounts(row.facts, near) for row in rows]) / time[:, None]
    kept = [place for place in range(len(_NAMES)) if amounts[:, place].any()]
    solution = _solved(amounts, kept)
    while kept and solution.min() < 0:
        del kept[int(solution.argmin())]
        solution = _solved(amounts, kept)
    terms = dict.fromkeys(_NAMES, 0.0)
    for place, price in zip(kept, solution, strict=True):
        terms[_NAMES[place]] = float(price)
    if not any(terms.values()):  # a profile of nothing but noise
        terms["constant"] = math.fsum(time) / len(time)
    prices = Prices(terms, near)
    off = [prices.predicted(row.facts) / row.milliseconds - 1 for row in rows]
    return prices, math.fsum(each**2 for each in off)


def _solved(amounts: NDArray[np.float64], kept: list[int]) -> NDArray[np.float64]:
    """Prices that make every relative prediction as near to 1 as can be."""
    columns = amounts[:, kept]
    scale = np.abs(columns).max(axis=0, initial=1e-300)
    solution = np.linalg.lstsq(columns / scale, np.ones(len(amounts)), rcond=None)[0]
    return np.asarray(solution / scale, dtype=np.float64)
