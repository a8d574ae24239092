"""Notes to a user on settings that have another name now: one plain line each on standard error.

    mobilellm: note: old.toml: optimizer.clip is called optimizer.max_grad_norm now

Old keys of a recipe and old flags are read for one release. With --json nothing is noted, and of
the processes of a job only the first speaks.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TextIO

from mobilellm.printable import one_line
from mobilellm.terminal.output import say


def note(line: str) -> None:
    """Print one note."""
    say(f"mobilellm: note: {one_line(line)}")


@contextlib.contextmanager
def warnings_as_notes(silent: bool) -> Iterator[None]:
    """Within it this package's own warnings are notes, each of them once, or nothing if `silent`.

    Warnings of other packages are shown as they were before.
    """
    silent = silent or os.environ.get("RANK", "0") != "0"
    noted: set[str] = set()

    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not category.__module__.startswith("mobilellm."):
                show_others(message, category, filename, lineno, file, line)
            elif not silent and str(message) not in noted:
                noted.add(str(message))
                note(str(message))

        warnings.showwarning = show
        yield


def renamed_flags(arguments: list[str], silent: bool) -> list[str]:
    """The arguments of `train` with flags of an earlier version under their names of today.

    Overrides of a preset, which were one flag each, become KEY=VALUE of --model.override.
    """
    from mobilellm.recipe.earlier_keys import OLD_KEYS, OVERRIDES_BEFORE

    now = {flag(section, old): flag(section, new) for (section, old), new in OLD_KEYS.items()}
    overrides = {flag("model", key): key for key in OVERRIDES_BEFORE}
    found: list[str] = []
    table: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        plain = name.replace("_", "-")
        if plain in overrides:
            table.append(f"{overrides[plain]}={value if equals else next(rest, '')}")
            new = f"--model.override {overrides[plain]}=VALUE"
        elif plain in now:
            found.append(now[plain] + equals + value)
            new = now[plain]
        else:
            found.append(argument)
            continue
        if not silent:
            note(f"{plain} is called {new} now")
    if table and "--model.override" in found:
        place = found.index("--model.override") + 1
        return [*found[:place], *table, *found[place:]]
    return [*found, "--model.override", *table] if table else found


def flag(section: str, key: str) -> str:
    """The flag of a recipe's key: ("train", "batch_tokens") is --train.batch-tokens."""
    return f"--{section}.{key.replace('_', '-')}"
