"""`mobilellm eval`: how well a model predicts a text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.cli.terminal import print_json, progress
from mobilellm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Loss, perplexity and bits per byte of a model on the held-out part of prepared data, or on any text.

    Example: mobilellm eval runs/demo --text book.txt
    """

    model: tyro.conf.Positional[Path]
    """A run, a checkpoint, a Hugging Face folder or a GGUF file."""
    data: Path | None = None
    """A folder made by `mobilellm prepare`; its held-out part is scored. A run's own when neither this nor --text is given."""
    text: Path | None = None
    """A text file (UTF-8) to score instead."""
    sequence_length: int = 0
    """Tokens in a window; 0 is the run's training length, or the model's context."""
    stride: int = 0
    """Tokens from one window to the next; 0 is sequence_length, so that windows do not overlap."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Score and print."""
        from mobilellm.evaluate.heldout import score_data, score_text
        from mobilellm.interop.checkpoint import load
        from mobilellm.train.recipe import Recipe

        if self.data and self.text:
            raise UserError("--data and --text are both given", mend="give one of them")
        if self.sequence_length < 0:
            raise UserError(f"--sequence-length {self.sequence_length}: must be 1 or more, or 0 for the default")
        recipe = next(
            (Recipe.read(folder / "recipe.toml") for folder in (self.model, *self.model.absolute().parents[:2])
             if (folder / "recipe.toml").is_file()), None,
        )  # fmt: skip
        data = self.data or (Path(recipe.data.path) if recipe and not self.text else None)
        if data is None and self.text is None:
            raise UserError(f"{self.model}: nothing to score it on", mend="give --data DATA or --text FILE")
        loaded = load(self.model)
        if loaded.tokenizer is None:
            raise UserError(f"{self.model}: has no tokenizer", mend="put its tokenizer.json or tokenizer.model into the folder")
        length = self.sequence_length or (recipe.data.sequence_length if recipe else loaded.config.max_position_embeddings)
        with progress("scoring", "tokens") as update:
            if data is not None:
                score = score_data(
                    loaded.network, loaded.tokenizer, data, sequence_length=length, stride=self.stride, progress=update
                )
            else:
                assert self.text is not None
                score = score_text(
                    loaded.network, loaded.tokenizer, self.text, sequence_length=length, stride=self.stride, progress=update
                )
        if self.json:
            print_json(dataclasses.asdict(score))
        else:
            print(
                f"loss {score.loss:.4f} nats a token, perplexity {score.perplexity:.3f}, {score.bits_per_byte:.4f} bits a byte "
                f"({score.tokens:,} tokens, {score.bytes:,} bytes)"
            )
        return 0
