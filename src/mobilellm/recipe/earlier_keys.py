"""Keys that recipes had before 0.2, read for one release."""

from __future__ import annotations

import warnings
from typing import Any

from mobilellm.errors import UserError


class OldKeyWarning(UserWarning):
    """A recipe uses a key's name of an earlier version."""


# (section, old key) -> the new one.
OLD_KEYS = {
    ("data", "stage"): "stages",
    ("train", "micro_batch"): "micro_batch_size",
    ("train", "skip_spikes"): "spike_threshold",
    ("train", "most_skipped"): "max_skipped_in_a_row",
    ("optimizer", "kind"): "name",
    ("optimizer", "clip"): "max_grad_norm",
    ("optimizer", "final_fraction"): "final_lr_fraction",
    ("parallel", "shard_within"): "shard_group_size",
}

OVERRIDES_BEFORE = {
    "layer_repeats",
    "shared_kv",
    "num_hidden_layers",
    "max_position_embeddings",
    "qk_norm",
}


def renamed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` with keys of an earlier version under their names of today, each told in one
    warning."""
    found = {
        name: dict(section) if isinstance(section, dict) else section
        for name, section in values.items()
    }
    for (section, old), new in OLD_KEYS.items():
        table = found.get(section)
        if not isinstance(table, dict) or old not in table:
            continue
        if new in table:
            raise UserError(
                f"{where}: both {section}.{new} and its old name {section}.{old} are given",
                hint=f"keep {section}.{new}",
            )
        _tell(f"{where}: {section}.{old} is called {section}.{new} now")
        table[new] = table.pop(old)
    model = found.get("model")
    if isinstance(model, dict):
        for old in sorted(OVERRIDES_BEFORE & model.keys()):
            _tell(f"{where}: model.{old} is written override = {{{old} = ...}} in [model] now")
            model["override"] = {**model.get("override", {}), old: model.pop(old)}
    return found


def _tell(line: str) -> None:
    warnings.warn(line, OldKeyWarning, stacklevel=5)
