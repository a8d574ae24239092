"""`mobilellm distill`: what a teacher says of training data, once, for many runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mobilellm.terminal.output import print_json, progress, put, size


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Ask a teacher for its likeliest tokens everywhere in prepared data, and keep them in a folder
    for [distill] cache. One that was stopped is continued by the same command.

    Example: mobilellm distill runs/large data/book --out caches/book --sequence-length 512
    """

    teacher: tyro.conf.Positional[Path]
    """A model with the data's tokenizer: a run, a checkpoint, a Hugging Face folder, a GGUF."""
    data: tyro.conf.Positional[Path]
    """Token folder, or the original's layout of samples; the training part is read."""
    out: Path
    """Folder to make."""
    top_k: int = 32
    """Tokens that are kept of each distribution; the others count together, as one."""
    sequence_length: int = 256
    """Tokens a sample: data.sequence_length of the runs that read the cache."""
    mask_documents: bool = False
    """Keep attention within each document, as data.mask_documents of these runs says."""
    temperature: float = 1.0
    """Divides the logits: distill.temperature of these runs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products; auto measures which one the device is faster at."""
    tokenizer: Path | None = None
    """Of samples that have none beside them."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Ask, and say what there is now."""
        from mobilellm.workflows.distill import distill

        with progress("asking the teacher") as update:
            facts = distill(
                self.teacher,
                self.data,
                self.out,
                sequence_length=self.sequence_length,
                top_k=self.top_k,
                mask_documents=self.mask_documents,
                temperature=self.temperature,
                precision=self.precision,
                tokenizer=self.tokenizer,
                progress=update,
            )
        total = sum(path.stat().st_size for path in self.out.iterdir())
        if self.json:
            print_json(facts | {"out": str(self.out), "bytes": total})
            return 0
        put(f"{facts['top_k']} tokens of each distribution, {size(total)}, in {self.out}")
        put(f"train with distill.cache = {self.out}")
        return 0
