"""`mobilellm search`: the best shape within a device's limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Search:
    """Find the shape that learns best within a device's limits, and write a recipe for it.

    Times are predicted from a device profile; the shapes at the limits are trained in rungs, of
    which a third goes on each time.

    Example: mobilellm search --device device/profile.json --max-latency 20ms --max-size 60MB
    --data data/book --out shapes --budget 2h
    """

    device: Path | None = None
    """profile.json of `mobilellm profile --out`, with four or more shapes."""
    max_latency: str = ""
    """The longest time of a token: 20ms."""
    max_size: str = ""
    """The largest file, in the format that was profiled: 60MB."""
    data: Path | None = None
    """A folder made by `mobilellm prepare`."""
    out: Path | None = None
    """The search's folder, to make or to go on with."""
    budget: str = "1h"
    """Time for all rungs together."""
    recipe: Path | None = None
    """How candidates are trained; recipes/laptop.toml when left out."""
    runtime: str = ""
    """The runtime of the profile, where it has several."""
    candidates: int = 9
    """Shapes of the first rung."""
    seeds: int = 1
    """Runs of each candidate."""
    head_dim: int = 32
    """Width of a head."""
    ffn_multiple: int = 32
    """The feed-forward is 8/3 of the width, rounded up to it."""
    shapes: Path | None = None
    """Write models of many shapes with random weights into this folder, to profile a device with,
    and end."""
    preset: str = ""
    """With --shapes: the size whose vocabulary and context they have."""
    yes: bool = False
    """Do not ask before it begins."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """0 with a winner, 130 after Ctrl-C."""
        from mobilellm.terminal.search_session import run_search

        return run_search(**vars(self))
