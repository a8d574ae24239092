"""`mobilellm quantize`: weights onto the grid that every runtime reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mobilellm.errors import UserError
from mobilellm.quantize.schemes import EMBEDDINGS, METHODS, SCHEMES
from mobilellm.terminal.output import print_json, progress, put, say

if TYPE_CHECKING:
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import Tokenizer
    from mobilellm.workflows.quantize import Row

    SchemeName = str
    MethodName = str
    EmbeddingName = str
else:
    SchemeName = Literal[tuple(SCHEMES)]
    MethodName = Literal[METHODS]
    EmbeddingName = Literal[EMBEDDINGS]


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantize a model once; `convert` then writes the same integers into every format.

    What is left out is what the model was trained for, else int4 by search, embedding int8.

    Example: mobilellm quantize runs/demo demo-int4 --scheme int4
    """

    model: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder, a GGUF file or a llama2.c file."""
    out: tyro.conf.Positional[Path | None] = None
    """Folder to make: an ordinary checkpoint with its weights on the grid. Not with --table."""
    scheme: SchemeName | None = None
    """int4: 4-bit blocks, groups of 32; int8: 8-bit blocks, a scale a row; 8da4w and w8a8: the same
    with activations of 8 bits."""
    method: MethodName | None = None
    """round: the smallest scale that clips nothing; search: the scale of least squared error; gptq:
    that, and integers that make up for each other's error on a text."""
    embedding: EmbeddingName | None = None
    """The embedding and the output layer: int8, a scale a row, or float, left as they are."""
    text: Path | None = None
    """A text (UTF-8) to measure perplexity on before and after. With gptq its first half
    calibrates and its second half is scored."""
    calibration: Path | None = None
    """A text for gptq alone; then all of --text is scored."""
    max_tokens: int | None = None
    """Score no more than so many tokens of the text."""
    table: bool = False
    """Write no model: measure fp32, bf16 and each scheme, method and embedding, or those given."""
    tasks: tuple[str, ...] = ()
    """With --table: tasks to score, too; `commonsense` is the eight of the published tables."""
    data: Path | None = None
    """A folder of the task files; without it the harness downloads."""
    limit: int | None = None
    """Items from the beginning of each task; all when not given."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Quantize or measure, and print."""
        if self.max_tokens is not None and self.max_tokens < 2:
            raise UserError(f"--max-tokens {self.max_tokens}: must be 2 or more")
        if self.table:
            return self.print_table()
        if self.tasks:
            raise UserError("--tasks are scored in the table alone", hint="give --table, too")
        if self.out is None:
            raise UserError("no folder to write to", hint="give OUT, or --table to measure alone")
        from mobilellm.terminal.quantize_lines import result_lines
        from mobilellm.workflows.quantize import quantize

        with progress("gptq", "blocks") as update:
            result = quantize(
                self.model,
                self.out,
                scheme=self.scheme,
                method=self.method,
                embedding=self.embedding,
                text=self.text,
                calibration=self.calibration,
                max_tokens=self.max_tokens,
                progress=update,
            )
        if self.json:
            print_json(dataclasses.asdict(result))
            return 0
        put("\n".join(result_lines(result)))
        return 0

    def print_table(self) -> int:
        """Measure every way to store the model, a line each as it comes."""
        from mobilellm.terminal.quantize_lines import HEAD
        from mobilellm.workflows.quantize import table

        if self.out is not None:
            raise UserError("--table writes no model", hint=f"leave out {self.out}")
        if self.text is None:
            raise UserError("--table measures on a text", hint="give --text FILE")
        if not self.json:
            put(HEAD)
        rows = table(
            self.model,
            self.text,
            calibration=self.calibration,
            schemes=(self.scheme,) if self.scheme else tuple(SCHEMES),
            methods=(self.method,) if self.method else METHODS,
            embeddings=(self.embedding,) if self.embedding else EMBEDDINGS,
            tasks=self.score_tasks if self.tasks else None,
            max_tokens=self.max_tokens,
            ready=self.show,
        )
        if self.json:
            print_json({"model": str(self.model), "rows": [dataclasses.asdict(r) for r in rows]})
        return 0

    def show(self, row: Row) -> None:
        """Print a row, on standard error with --json."""
        from mobilellm.terminal.quantize_lines import row_line

        if self.json:
            say(row_line(row))
        else:
            put(row_line(row), flush=True)

    def score_tasks(self, network: Network, tokenizer: Tokenizer) -> dict[str, float]:
        """Accuracy on the tasks asked for."""
        from mobilellm.tasks.task_scores import score_tasks

        found = score_tasks(network, tokenizer, list(self.tasks), self.data, self.limit)
        return {name: score["acc"] for name, score in found.items() if "acc" in score}
