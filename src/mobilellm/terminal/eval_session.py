"""`mobilellm eval` as a person sees it: models scored on a text by what runs them, and on tasks.

score = score_text(Path("runs/demo"), text="book.txt")
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.evaluate import held_out
from mobilellm.evaluate.perplexity import Score
from mobilellm.files import cache_folder, write_json
from mobilellm.interop.load import load
from mobilellm.model.precision import Precision
from mobilellm.recipe.recipe import Recipe
from mobilellm.report.score_table import Row, measured_row, published_rows, set_in
from mobilellm.report.scores_page import write_tables
from mobilellm.runtimes.running import default_runtime
from mobilellm.runtimes.table import OURS
from mobilellm.streams.places import place_of
from mobilellm.tasks.campaign import Subject, run_tasks, write_samples
from mobilellm.tasks.harness_tasks import load_tasks
from mobilellm.tasks.protocols import Sample
from mobilellm.tasks.session_backend import session_score, session_subject
from mobilellm.tasks.wikitext import wikitext_perplexity
from mobilellm.terminal.output import print_json, progress, say
from mobilellm.terminal.running import opened
from mobilellm.terminal.score_lines import print_comparison, print_differences, print_scores
from mobilellm.workflows.subjects import open_subject


def foreign(model: Path, runtime: str | None) -> bool:
    """Whether another runtime than our own network runs the model."""
    return model.exists() and default_runtime(model, runtime).name != OURS


def score_text(
    model: Path,
    *,
    data: Path | None = None,
    text: str | None = None,
    sequence_length: int = 0,
    stride: int = 0,
    max_tokens: int | None = None,
    runtime: str | None = None,
    threads: int | None = None,
    precision: Precision | None = None,
) -> Score:
    """A model's loss on held-out data or a text. The arguments are the verb's flags."""
    if foreign(model, runtime):
        if text is None:
            raise UserError(
                f"{model}: nothing to score it on", hint="give --text FILE or --tasks TASKS"
            )
        with (
            opened(model, runtime, threads, precision) as running,
            progress(f"scoring by {running.runtime}", "tokens") as update,
        ):
            return session_score(
                running.session,
                running.tokenizer,
                place_of(text),
                sequence_length=sequence_length,
                stride=stride,
                max_tokens=max_tokens,
                progress=update,
            )
    recipe = next(
        (
            Recipe.read(folder / "recipe.toml")
            for folder in (model, *model.absolute().parents[:2])
            if (folder / "recipe.toml").is_file()
        ),
        None,
    )
    data = data or (Path(recipe.data.path) if recipe and not text else None)
    if data is None and text is None:
        raise UserError(
            f"{model}: nothing to score it on",
            hint="give --data DATA, --text FILE or --tasks TASKS",
        )
    loaded = load(model, release=True)
    tokenizer = loaded.require_tokenizer(model)
    length = sequence_length or (
        recipe.data.sequence_length if recipe else loaded.config.max_position_embeddings
    )
    own = Precision(recipe.train.precision) if recipe else Precision.FP32
    with progress("scoring", "tokens") as update:
        options: dict[str, Any] = {
            "sequence_length": length,
            "stride": stride,
            "precision": precision or own,
            "progress": update,
        }
        if data is not None:
            return held_out.score_data(loaded.as_run, tokenizer, data, **options)
        assert text is not None
        return held_out.score_text(
            loaded.as_run, tokenizer, place_of(text), max_tokens=max_tokens, **options
        )


def score_tasks(
    models: Sequence[Path],
    names: Sequence[str],
    tasks: Sequence[str],
    *,
    data: Path | None,
    protocol: str,
    limit: int | None,
    sequence_length: int,
    stride: int,
    runtime: str | None,
    threads: int | None,
    precision: Precision | None,
    recheck: bool,
    batch_tokens: int,
    cache: Path | None,
    out: Path | None,
    compare: bool,
    explain: int,
    json: bool,
) -> None:
    """Score models on tasks, under their `names`; print, and write what `out` asks for. The other
    arguments are the verb's flags."""
    named = [name for name in tasks if name != "wikitext2"]
    if len(named) < len(tasks) and data is None:
        raise UserError(
            "wikitext2 is read from a folder",
            hint="give --data, or take the harness's task wikitext",
        )
    known = load_tasks(named, data) if named else {}
    for task in known.values():
        if task.altered:
            say(f"{task.altered}; its scores are marked")
    scores: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[Sample]] = {}
    rows: list[Row] = []
    with contextlib.ExitStack() as sessions:
        for name, model in zip(names, models, strict=True):
            options = (runtime, threads, precision, recheck, batch_tokens)
            subject = _subject(name, model, sessions, *options)
            scores[name], samples[name] = run_tasks(
                subject,
                known,
                cache=cache or cache_folder() / "eval",
                protocol=protocol,
                limit=limit,
                progress=functools.partial(progress, unit="items"),
            )
            if "wikitext2" in tasks:
                assert data is not None
                with progress(f"{name}: wikitext2", "windows") as update:
                    scores[name]["wikitext2"] = wikitext_perplexity(
                        subject.engine,
                        subject.encoder,
                        data,
                        length=sequence_length,
                        stride=stride,
                        progress=update,
                    )
            _say_what_was_cut(name, scores[name])
            if "average" in scores[name]:
                rows.append(measured_row(name, scores[name], subject.parameters))
    rows = set_in(rows, published_rows()) if compare else rows
    if out:
        write_json(out / "scores.json", scores)
        write_samples(out / "samples.jsonl", samples)
        write_tables(out, rows)
    if json:
        print_json(scores if len(scores) > 1 else next(iter(scores.values())))
        return
    print_scores(scores)
    if compare:
        print_comparison(rows, samples)
    if explain:
        print_differences(samples, explain)


def _subject(
    name: str,
    model: Path,
    sessions: contextlib.ExitStack,
    runtime: str | None,
    threads: int | None,
    precision: Precision | None,
    recheck: bool,
    batch_tokens: int,
) -> Subject:
    """A model ready to be scored on tasks; `sessions` closes what another runtime opened."""
    if not foreign(model, runtime):
        return open_subject(name, model, precision or Precision.FP32, batch_tokens, recheck)
    if recheck:
        raise UserError(f"{model}: --recheck is for models that our own network runs")
    running = sessions.enter_context(opened(model, runtime, threads, precision))
    return session_subject(name, model, running)


def _say_what_was_cut(name: str, scores: dict[str, dict[str, Any]]) -> None:
    """A line for each task some of whose items were not scored as they are written."""
    for task, score in scores.items():
        if "truncated" in score:
            say(
                f"{name}: {task}: {score['truncated']} items exceed the model's context and lost "
                "their beginning"
            )
        if "encoded_apart" in score:
            say(
                f"{name}: {task}: {score['encoded_apart']} items have a continuation that merges "
                "into its context; it was encoded by itself"
            )
