"""`mobilellm prepare`: text to token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.cli.terminal import count, print_json, progress


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn text into a folder of token shards, with a held-out part that is never trained on.

    Reads .txt, .md, .jsonl, each also .gz, and folders of them.

    Example: mobilellm prepare book.txt --out data/book --vocab-size 2048
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files and folders; NAME=PATH puts one under a name of its own."""
    out: Path
    """Folder to make."""
    tokenizer: Path | None = None
    """Existing tokenizer: a folder with tokenizer.json, or a SentencePiece tokenizer.model. Without one, a byte-level BPE is
    trained on the training part of the text."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""
    held_out: float = 0.01
    """Fraction held out: of documents, or the tail of a single document."""
    text_field: str = "text"
    """Field of a .jsonl line that holds the text."""
    bos: bool = False
    """Put a BOS token before each document."""
    eos: bool = True
    """Put an EOS token after each document."""
    seed: int = 0
    """Chooses the documents that are held out."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Prepare, and say what came out."""
        from mobilellm.data.prepare import parse_sources, prepare
        from mobilellm.data.tokenizer import Tokenizer

        with progress("preparing", "bytes") as update:
            manifest = prepare(
                parse_sources(self.sources), self.out, tokenizer=Tokenizer.load(self.tokenizer) if self.tokenizer else None,
                vocab_size=self.vocab_size, held_out=self.held_out, seed=self.seed, bos=self.bos, eos=self.eos,
                text_field=self.text_field, progress=update,
            )  # fmt: skip
        if self.json:
            print_json(manifest)
            return 0
        for name, split in manifest["splits"].items():
            print(
                f"{name:8} {split['documents']:>9,} documents  {split['tokens']:>13,} tokens  "
                f"{split['bytes']:>13,} bytes of text  {split['bytes'] / max(1, split['tokens']):.2f} bytes a token"
            )
        size = manifest["tokenizer"]["vocab_size"]
        print(f"{count(manifest['splits']['train']['tokens'])} tokens to train on in {self.out}, of a vocabulary of {size:,}")
        return 0
