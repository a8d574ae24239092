"""The short help of `mobilellm train`: how a run is given, and the ten settings changed most often.

`mobilellm train --help-all` shows every setting, section by section.
"""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from typing import Any

from mobilellm.cli.train import SECTIONS, Train
from mobilellm.recipe.recipe import Recipe
from mobilellm.terminal.field_docs import field_docs, type_name
from mobilellm.terminal.notes import flag

HELP_ALL = "--help-all"
FIRST = (
    ("model", "preset"),
    ("start", "from_"),
    ("data", "path"),
    ("data", "sequence_length"),
    ("train", "steps"),
    ("train", "batch_tokens"),
    ("train", "precision"),
    ("optimizer", "name"),
    ("optimizer", "learning_rate"),
    ("optimizer", "schedule"),
)
USAGE = """usage: mobilellm train [RECIPE] --out RUN [--SECTION.KEY VALUE ...]
       mobilellm train --resume RUN"""
MAX_WIDTH = 100
INDENT = 26


def short_help(defaults: Train) -> str:
    """The text of `mobilellm train --help`, with the values of `defaults` as those of today."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)

    def entry(name: str, text: str) -> str:
        lines = textwrap.wrap(text, width - INDENT)
        first = f"  {name:<{INDENT - 2}}"
        start = [first + lines.pop(0)] if len(name) < INDENT - 2 else [first.rstrip()]
        return "\n".join([*start, *(" " * INDENT + line for line in lines)])

    about = " ".join((Train.__doc__ or "").split("\n\n")[0].split())
    example = "mobilellm train recipes/laptop.toml --data.path data/book --out runs/book"
    run = [
        entry("RECIPE" if name == "recipe" else "--" + name.replace("_", "-"), text)
        for name, text in field_docs(Train).items()
        if name not in SECTIONS
    ]
    settings = []
    for section, key in FIRST:
        cls = type(getattr(defaults, section))
        value = shown(getattr(getattr(defaults, section), key))
        kind = type_name(typing.get_type_hints(cls)[key])
        text = f"{field_docs(cls)[key]} ({kind}; default: {value})"
        settings.append(entry(flag(section, key.removesuffix("_")), text))
    number = sum(len(dataclasses.fields(section)) for _, section in Recipe().sections())
    return "\n".join(
        [
            USAGE,
            "",
            about,
            "Settings are defaults, then the recipe file, then flags.",
            "",
            f"Example: {example}",
            "",
            "The run:",
            *run,
            "",
            "The settings changed most often:",
            *settings,
            "",
            f"All {number} settings, section by section: mobilellm train {HELP_ALL}",
        ]
    )


def shown(value: Any) -> str:
    """A default as the help shows it."""
    return "none" if value in ("", None) else str(value)
