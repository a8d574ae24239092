"""`mobilellm eval`: how well models predict a text, and how they do on tasks."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mobilellm.errors import UserError
from mobilellm.model.precision import Precision
from mobilellm.printable import one_line
from mobilellm.terminal.output import print_json, put, say
from mobilellm.terminal.running import PrecisionFlag

if TYPE_CHECKING:
    from mobilellm.evaluate.perplexity import Score


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
    recheck: bool = False
    """With --precision bf16: items whose choice could depend on it are computed again in fp32, so
    that each choice is that of fp32 (docs/evaluation.md)."""
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
        if self.limit is not None or self.compare or self.explain or self.out or self.recheck:
            raise UserError(
                "--limit, --compare, --explain, --out and --recheck are for tasks",
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

    def score_text(self, model: Path) -> Score:
        """A model's loss on held-out data or a text."""
        from mobilellm.terminal.eval_session import score_text

        return score_text(
            model,
            data=self.data,
            text=self.text,
            sequence_length=self.sequence_length,
            stride=self.stride,
            max_tokens=self.max_tokens,
            runtime=self.runtime,
            threads=self.threads,
            precision=self.precision,
        )

    def run_tasks(self) -> int:
        """Score the models on tasks; print, and write what --out asks for."""
        from mobilellm.terminal.call_lines import is_asked, print_asked, score_asked
        from mobilellm.terminal.score_lines import labels

        if self.text:
            raise UserError("--text and --tasks are both given", hint="give one of them")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")
        names = labels(self.models)
        others = is_asked(self.tasks) or "wikitext2" in self.tasks
        if self.recheck and (self.precision is not Precision.BF16 or others):
            raise UserError("--recheck is for --precision bf16 and tasks with choices")
        if is_asked(self.tasks):
            from mobilellm.files import write_json

            given = (self.tasks, self.data, self.limit, self.runtime, self.threads)
            asked = score_asked(self.models, names, *given)
            if self.out:
                write_json(self.out / "scores.json", asked)
            print_json(asked) if self.json else print_asked(asked)
            return 0
        if self.batch_tokens < 1:
            raise UserError(f"--batch-tokens {self.batch_tokens}: must be 1 or more")
        if self.explain and len(self.models) < 2:
            raise UserError("--explain needs two models to find differences between")
        from mobilellm.terminal.eval_session import score_tasks

        score_tasks(
            self.models,
            names,
            self.tasks,
            data=self.data,
            protocol=self.protocol,
            limit=self.limit,
            sequence_length=self.sequence_length,
            stride=self.stride,
            runtime=self.runtime,
            threads=self.threads,
            precision=self.precision,
            recheck=self.recheck,
            batch_tokens=self.batch_tokens,
            cache=self.cache,
            out=self.out,
            compare=self.compare,
            explain=self.explain,
            json=self.json,
        )
        return 0

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
