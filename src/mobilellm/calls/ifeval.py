"""IFEval: whether answers follow instructions that a program can check (arXiv 2311.07911).

    followed(row, "my answer, in lower case")     # {"strict": [True, False], "loose": [True, True]}

The checks are those of EleutherAI's lm-evaluation-harness. They load nltk's data from the network;
in the two that need it something else stands in its place, named in `STAND_INS`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mobilellm.calls.answers import figure, rows_of
from mobilellm.errors import UserError

STAND_INS = (
    "number_sentences: sentences by a splitter of ours, not by nltk's punkt",
    "capital_word_frequency: words by nltk, not cut into sentences before",
)
NO_END = ("mr.", "mrs.", "ms.", "dr.", "st.", "prof.", "vs.", "etc.", "e.g.", "i.e.", "no.", "jr.")
END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|\Z)""")


def count_sentences(text: str) -> int:
    """Sentences: what ends in . ! or ?, but for usual abbreviations and single letters."""
    count, start = 0, 0
    for found in END.finditer(text):
        words = text[start : found.end()].split()
        last = words[-1].lower() if words else ""
        if last in NO_END or re.fullmatch(r"(?:[a-z]\.)+", last):
            continue
        count, start = count + 1, found.end()
    return count + bool(text[start:].strip())


@functools.cache
def harness() -> Any:
    """The harness's module of checks. `UserError` where it is not installed."""
    for package in ("lm_eval", "nltk", "langdetect", "immutabledict"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"ifeval needs {package}, which is not installed",
                hint="pip install 'mobilellm[eval]'",
            )
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # else the same text has one language today, another then
    find = nltk.data.find
    nltk.data.find = lambda *_: ""  # importing the checks would download punkt_tab
    try:
        from lm_eval.tasks.ifeval import instructions_util, utils
    finally:
        nltk.data.find = find

    def words(text: str) -> list[str]:
        return list(nltk.word_tokenize(text, preserve_line=True))

    instructions_util.count_sentences = count_sentences
    instructions_util.nltk = SimpleNamespace(word_tokenize=words, tokenize=nltk.tokenize)
    return utils


def followed(row: Mapping[str, Any], text: str) -> dict[str, list[bool]]:
    """Of each instruction of a prompt, whether the answer follows it; "loose" also without its
    first or last line, or without asterisks."""
    utils = harness()
    given = utils.InputExample(
        key=row["key"],
        instruction_id_list=row["instruction_id_list"],
        prompt=row["prompt"],
        kwargs=row["kwargs"],
    )
    checks = {
        "strict": utils.test_instruction_following_strict,
        "loose": utils.test_instruction_following_loose,
    }
    return {
        kind: list(check(given, text).follow_instruction_list) for kind, check in checks.items()
    }


def ifeval_scores(
    ask: Callable[[Sequence[Mapping[str, Any]], Any], str | None],
    folder: Path | None,
    limit: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Percent of prompts whose instructions are all followed, and of instructions."""
    harness()
    rows = [row for row, _ in rows_of(folder, "ifeval_prompts")][:limit]
    found: dict[str, list[list[bool]]] = {"strict": [], "loose": []}
    for number, row in enumerate(rows, 1):
        text = ask([{"role": "user", "content": row["prompt"]}], None) or ""
        for kind, one in followed(row, text).items():
            found[kind].append(one)
        if progress:
            progress(number, len(rows))
    scores: dict[str, Any] = {}
    for kind, all_of in found.items():
        groups = [n for n, one in enumerate(all_of) for _ in one]
        scores[f"prompts_{kind}"] = figure([float(all(one)) for one in all_of], range(len(all_of)))
        scores[f"instructions_{kind}"] = figure([float(x) for one in all_of for x in one], groups)
    return scores | {"stand_ins": list(STAND_INS)}
