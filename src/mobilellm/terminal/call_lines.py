"""`mobilellm eval --tasks api`, `bfcl` and `ifeval`: models asked, and what is printed of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.terminal.output import progress, put, say

LONGEST = {"api": 192, "bfcl": 256, "ifeval": 1024}
"""Most new tokens of an answer, by task."""


def is_asked(tasks: Sequence[str]) -> bool:
    """Whether the tasks are those in which a chat model is asked. `UserError` for a mixture."""
    asked = [task for task in tasks if task in LONGEST]
    if asked and len(asked) < len(tasks):
        raise UserError(
            f"--tasks {' '.join(tasks)}: {', '.join(asked)} and others are scored apart",
            hint="two commands",
        )
    return bool(asked)


def score_asked(
    models: Sequence[Path],
    names: Sequence[str],
    tasks: Sequence[str],
    data: Path | None,
    limit: int | None,
    runtime: str | None,
    threads: int | None,
) -> dict[str, dict[str, Any]]:
    """Scores by the models' names and by task. `limit` is of the items of a task or set."""
    from mobilellm.calls.answers import Asker
    from mobilellm.calls.api import api_items, api_scores, bfcl_scores
    from mobilellm.calls.ifeval import ifeval_scores
    from mobilellm.runtimes.running import open_model
    from mobilellm.tokenizer.chat_template import NO_TOOLS, passed_over

    items = api_items(data, limit) if "api" in tasks else []
    found: dict[str, dict[str, Any]] = {}
    for name, path in zip(names, models, strict=True):
        found[name] = {}
        with open_model(path, runtime, threads=threads) as model:
            for task in tasks:
                ask = Asker(model, LONGEST[task])
                if task != "ifeval" and passed_over(model.tokenizer, ask.with_tools):
                    say(f"note: {name}: {NO_TOOLS}")
                with progress(f"{name}: {task}", "items") as update:
                    if task == "api":
                        found[name][task] = api_scores(ask, items, update)
                    else:
                        score = bfcl_scores if task == "bfcl" else ifeval_scores
                        found[name][task] = score(ask, data, limit, update)
    return found


def print_asked(scores: dict[str, dict[str, Any]]) -> None:
    """Percents with 95 % intervals."""
    for name, tasks in scores.items():
        put(name)
        for task, row in tasks.items():
            if task == "api":
                _print_api(row)
                continue
            for key, one in row.items():
                if isinstance(one, dict):
                    put(f"  {task:8} {key:24} {_shown(one)}  ({one['count']:,} items)")
            for line in row.get("stand_ins", ()):
                put(f"  {task:8} {line}")


def _print_api(row: dict[str, Any]) -> None:
    from mobilellm.calls.api import COLUMNS, PARTS

    put(f"  {'api':16}" + "".join(f"{column:>24}" for column in COLUMNS))
    for part in PARTS:
        put(f"  {part:16}" + "".join(f"{_shown(row[part][column]):>24}" for column in COLUMNS))
    for model, values in row["published"].items():
        numbers = "".join(f"{values[column]:>24.1f}" for column in COLUMNS)
        put(f"  {model:16}{numbers}  {values['note']} (arXiv 2402.14905, table 6)")
    whole = row["all"]
    put(
        f"  {whole['EM_intent']['count']:,} calls and {whole['Rouge-1']['count']:,} replies; "
        f"a call in place of a reply: {_shown(whole['called'])}; without room: {row['no_room']:,}"
    )


def _shown(one: dict[str, Any]) -> str:
    if one["percent"] is None:
        return "-"
    return f"{one['percent']:.1f} [{one['low']:.1f}, {one['high']:.1f}]"
