"""`mobilellm eval`: how well models predict a text, and how they do on tasks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mobilellm.errors import UserError
from mobilellm.model.precision import Precision
from mobilellm.printable import one_line
from mobilellm.terminal.output import print_json, progress, put, say
from mobilellm.terminal.running import PrecisionFlag, opened

if TYPE_CHECKING:
    from mobilellm.evaluate.perplexity import Score
    from mobilellm.report.score_table import Row
    from mobilellm.tasks.campaign import Subject
    from mobilellm.tasks.protocols import Sample


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Loss, perplexity and bits per byte on held-out data or any text, or scores on tasks
    (--tasks).

    Example: mobilellm eval runs/demo --text book.txt Example: mobilellm eval runs/demo --tasks
    commonsense --data data/eval --limit 200 --out scores
    """

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Runs, checkpoints, Hugging Face folders (with --tasks any causal model of transformers), GGUF
    files, or files that another runtime runs (.pte, ONNX folders)."""
    data: Path | None = None
    """A folder made by `mobilellm prepare`; its held-out part is scored. A run's own when
    neither this nor --text is given. With --tasks, a folder of the eight task files; without it
    the harness downloads."""
    text: str | None = None
    """A text file (UTF-8), or the address of one, to score instead."""
    sequence_length: int = 0
    """Tokens in a window; 0 is the run's training length, or the model's context (with wikitext2
    at most 2,048)."""
    stride: int = 0
    """Tokens from one window to the next; 0 is sequence_length, so that windows do not overlap."""
    max_tokens: int | None = None
    """Score no more than so many tokens of --text."""
    runtime: str | None = None
    """What runs the models: our own network for what it reads, else the file's runtime. A GGUF file
    also runs by llama.cpp. Other runtimes score --text token by token."""
    threads: int | None = None
    """Threads; when not given, as many as the runtime takes."""
    json: bool = False
    """Print one JSON object."""
    tasks: tuple[str, ...] = ()
    """Tasks to score: `commonsense` (the eight of the published tables), or names of the
    lm-evaluation-harness's tasks. `wikitext2` is perplexity as the original's eval.py counts it,
    `wikitext` as the harness does. `api`, `bfcl` and `ifeval` ask a chat model (docs/chat.md)."""
    protocol: Literal["harness", "paper"] = "harness"
    """`harness` is acc and acc_norm as lm-eval has them; `paper` is the way of the published
    tables (docs/evaluation.md)."""
    limit: int | None = None
    """Items from the beginning of each task; all when not given."""
    out: Path | None = None
    """A folder for scores.json, samples.jsonl and the tables."""
    compare: bool = False
    """Set the models' rows into the published tables, and compare the first two models item by
    item. Without a model, print the published tables."""
    explain: int = 0
    """Print so many items that one of the first two models has right and the other wrong."""
    precision: PrecisionFlag = None
    """What is computed in. Without it tasks are in fp32, which equals the harness's scores, and a
    run's text is in what the run trained in, which equals the loss in its metrics."""
    batch_tokens: int = 2048
    """Tokens in a batch of task items. It halves by itself when memory runs out."""
    cache: Path | None = None
    """Where results of tasks are kept, so that an interrupted run continues;
    ~/.cache/mobilellm/eval when not given."""

    def run(self) -> int:
        """Score and print."""
        if not self.models and self.compare:
            return self.print_published()
        if not self.models:
            raise UserError(
                "no model given",
                hint="give a run, a checkpoint, a Hugging Face folder or a GGUF file",
            )
        if self.tasks:
            return self.run_tasks()
        if self.limit is not None or self.compare or self.explain or self.out:
            raise UserError(
                "--limit, --compare, --explain and --out are for tasks",
                hint="give --tasks commonsense, too",
            )
        if self.data and self.text:
            raise UserError("--data and --text are both given", hint="give one of them")
        if self.max_tokens is not None and (self.max_tokens < 2 or not self.text):
            raise UserError(
                f"--max-tokens {self.max_tokens}: must be 2 or more, of a text",
                hint="give --text FILE, or leave it out",
            )
        if self.sequence_length < 0:
            raise UserError(
                f"--sequence-length {self.sequence_length}: must be 1 or more, or 0 for the default"
            )
        found = {str(model): dataclasses.asdict(self.score_text(model)) for model in self.models}
        if self.json:
            print_json(found if len(found) > 1 else next(iter(found.values())))
            return 0
        for name, score in found.items():
            put(
                (f"{name}: " if len(found) > 1 else "")
                + "loss {loss:.4f} nats a token, perplexity {perplexity:.3f}, "
                "{bits_per_byte:.4f} bits a byte ({tokens:,} tokens, {bytes:,} bytes)".format(
                    **score
                )
            )
        return 0

    def foreign(self, model: Path) -> bool:
        """Whether another runtime than our own network runs it."""
        from mobilellm.runtimes.running import default_runtime
        from mobilellm.runtimes.table import OURS

        return model.exists() and default_runtime(model, self.runtime).name != OURS

    def score_session(self, model: Path) -> Score:
        """A model's loss on a text, by its runtime."""
        from mobilellm.streams.places import place_of
        from mobilellm.tasks.session_backend import session_score

        if self.text is None:
            raise UserError(
                f"{model}: nothing to score it on", hint="give --text FILE or --tasks TASKS"
            )
        with (
            opened(model, self.runtime, self.threads, self.precision) as running,
            progress(f"scoring by {running.runtime}", "tokens") as update,
        ):
            return session_score(
                running.session,
                running.tokenizer,
                place_of(self.text),
                sequence_length=self.sequence_length,
                stride=self.stride,
                max_tokens=self.max_tokens,
                progress=update,
            )

    def score_text(self, model: Path) -> Score:
        """A model's loss on held-out data or a text."""
        from mobilellm.evaluate.held_out import score_data, score_text
        from mobilellm.interop.load import load
        from mobilellm.recipe.recipe import Recipe
        from mobilellm.streams.places import place_of

        if self.foreign(model):
            return self.score_session(model)
        recipe = next(
            (
                Recipe.read(folder / "recipe.toml")
                for folder in (model, *model.absolute().parents[:2])
                if (folder / "recipe.toml").is_file()
            ),
            None,
        )
        data = self.data or (Path(recipe.data.path) if recipe and not self.text else None)
        if data is None and self.text is None:
            raise UserError(
                f"{model}: nothing to score it on",
                hint="give --data DATA, --text FILE or --tasks TASKS",
            )
        loaded = load(model, release=True)
        tokenizer = loaded.require_tokenizer(model)
        length = self.sequence_length or (
            recipe.data.sequence_length if recipe else loaded.config.max_position_embeddings
        )
        own = Precision(recipe.train.precision) if recipe else Precision.FP32
        with progress("scoring", "tokens") as update:
            options: dict[str, Any] = {
                "sequence_length": length,
                "stride": self.stride,
                "precision": self.precision or own,
                "progress": update,
            }
            if data is not None:
                return score_data(loaded.as_run, tokenizer, data, **options)
            assert self.text is not None
            return score_text(
                loaded.as_run, tokenizer, place_of(self.text), max_tokens=self.max_tokens, **options
            )

    def run_tasks(self) -> int:
        """Score the models on tasks; print, and write what --out asks for."""
        with contextlib.ExitStack() as sessions:
            return self.print_tasks(sessions)

    def print_tasks(self, sessions: contextlib.ExitStack) -> int:
        """As `run_tasks`; `sessions` closes what other runtimes opened."""
        from mobilellm.files import cache_folder, write_json
        from mobilellm.report.score_table import measured_row
        from mobilellm.report.scores_page import write_tables
        from mobilellm.tasks.campaign import run_tasks, write_samples
        from mobilellm.tasks.harness_tasks import load_tasks
        from mobilellm.tasks.wikitext import wikitext_perplexity
        from mobilellm.terminal.call_lines import is_asked, print_asked, score_asked
        from mobilellm.terminal.score_lines import (
            labels,
            print_comparison,
            print_differences,
            print_scores,
        )

        if self.text:
            raise UserError("--text and --tasks are both given", hint="give one of them")
        if is_asked(self.tasks):
            given = (self.tasks, self.data, self.limit, self.runtime, self.threads)
            asked = score_asked(self.models, labels(self.models), *given)
            if self.out:
                write_json(self.out / "scores.json", asked)
            print_json(asked) if self.json else print_asked(asked)
            return 0
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")
        if self.batch_tokens < 1:
            raise UserError(f"--batch-tokens {self.batch_tokens}: must be 1 or more")
        if self.explain and len(self.models) < 2:
            raise UserError("--explain needs two models to find differences between")
        names = labels(self.models)
        named = [name for name in self.tasks if name != "wikitext2"]
        if len(named) < len(self.tasks) and self.data is None:
            raise UserError(
                "wikitext2 is read from a folder",
                hint="give --data, or take the harness's task wikitext",
            )
        tasks = load_tasks(named, self.data) if named else {}
        for task in tasks.values():
            if task.altered:
                say(f"{task.altered}; its scores are marked")
        cache = self.cache or cache_folder() / "eval"
        scores: dict[str, dict[str, Any]] = {}
        samples: dict[str, list[Sample]] = {}
        sizes: dict[str, int] = {}
        for name, model in zip(names, self.models, strict=True):
            subject = self.open_subject(name, model, sessions)
            sizes[name] = subject.parameters
            scores[name], samples[name] = run_tasks(
                subject,
                tasks,
                cache=cache,
                protocol=self.protocol,
                limit=self.limit,
                progress=functools.partial(progress, unit="items"),
            )
            if "wikitext2" in self.tasks:
                assert self.data is not None
                with progress(f"{name}: wikitext2", "windows") as update:
                    scores[name]["wikitext2"] = wikitext_perplexity(
                        subject.engine,
                        subject.encoder,
                        self.data,
                        length=self.sequence_length,
                        stride=self.stride,
                        progress=update,
                    )
            for task_name, score in scores[name].items():
                if "truncated" in score:
                    say(
                        f"{name}: {task_name}: {score['truncated']} items exceed the model's "
                        "context and lost their beginning"
                    )
                if "encoded_apart" in score:
                    say(
                        f"{name}: {task_name}: {score['encoded_apart']} items have a continuation "
                        "that merges into its context; it was encoded by itself"
                    )
        rows = [
            measured_row(name, score, sizes[name])
            for name, score in scores.items()
            if "average" in score
        ]
        if self.out:
            write_json(self.out / "scores.json", scores)
            write_samples(self.out / "samples.jsonl", samples)
            write_tables(self.out, self.all_rows(rows))
        if self.json:
            print_json(scores if len(scores) > 1 else next(iter(scores.values())))
            return 0
        print_scores(scores)
        if self.compare:
            print_comparison(self.all_rows(rows), samples)
        if self.explain:
            print_differences(samples, self.explain)
        return 0

    def open_subject(self, name: str, model: Path, sessions: contextlib.ExitStack) -> Subject:
        """A model ready to be scored on tasks, by the runtime that the flags name."""
        from mobilellm.workflows.subjects import open_subject

        if not self.foreign(model):
            return open_subject(name, model, self.precision or Precision.FP32, self.batch_tokens)
        from mobilellm.tasks.session_backend import session_subject

        running = sessions.enter_context(opened(model, self.runtime, self.threads, self.precision))
        return session_subject(name, model, running)

    def all_rows(self, rows: list[Row]) -> list[Row]:
        """The measured rows, with --compare among the published."""
        from mobilellm.report.score_table import published_rows, set_in

        return set_in(rows, published_rows()) if self.compare else rows

    def print_published(self) -> int:
        """The published tables alone; --out takes them too."""
        from mobilellm.report.score_table import markdown, published_rows
        from mobilellm.report.scores_page import write_tables

        rows = published_rows()
        if self.out:
            write_tables(self.out, rows)
        if self.json:
            print_json([dataclasses.asdict(row) for row in rows])
        else:
            put(markdown(rows))
        return 0


def harness_main() -> None:
    """`mobilellm-lm-eval`: the harness's own command line, to which `--model mobilellm` is
    known."""
    from mobilellm.tasks.harness_tasks import require_harness
    from mobilellm.workflows.subjects import register_with_harness

    try:
        require_harness()
        register_with_harness()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        say(f"mobilellm: {one_line(str(error))}")
        sys.exit(2)
