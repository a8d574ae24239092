"""`mobilellm data-stats`: what prepared data consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mobilellm.printable import one_line
from mobilellm.report.figures import count
from mobilellm.terminal.output import print_json, progress, put


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Tokens, document lengths, sources, frequent tokens and samples of prepared data, also as
    HTML.

    Example: mobilellm data-stats data/book --html book.html
    """

    data: tyro.conf.Positional[Path]
    """Token folder, or the original's layout of samples."""
    tokenizer: Path | None = None
    """Of samples that have none beside them."""
    html: Path | None = None
    """Write the page here too."""
    top: int = 50
    """Frequent tokens that are listed."""
    seed: int = 0
    """Chooses the sample documents."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Count, print, and write the page."""
        from mobilellm.data.dataset import open_dataset
        from mobilellm.data.stats import statistics
        from mobilellm.report.data_page import write_data_page

        data = open_dataset(self.data, self.tokenizer)
        with progress("reading", "tokens") as update:
            figures = statistics(data, top=max(0, self.top), seed=self.seed, progress=update)
        cleaning = getattr(data, "manifest", {}).get("cleaning")
        if cleaning:
            figures["cleaning"] = cleaning
        if self.html is not None:
            write_data_page(self.html, self.data.resolve().name, figures)
        if self.json:
            print_json(figures)
            return 0
        self.show(figures)
        return 0

    def show(self, figures: dict[str, Any]) -> None:
        """The figures as text."""
        for name, split in figures["splits"].items():
            counts = (f"{split[key]:>14,} {key}" for key in ("documents", "tokens", "bytes"))
            put(f"{name:8} {'  '.join(counts)}  {split['bytes_per_token']:.2f} bytes a token")
        vocabulary, length = figures["vocabulary"], figures["length"]
        used = f"{vocabulary['used']:,} of {figures['tokenizer']['vocab_size']:,} used"
        put(f"vocabulary  {used}, {vocabulary['entropy_bits']:.2f} bits of entropy a token")
        span = f"{length['least']:,} to {length['most']:,}"
        put(f"\ndocument lengths in tokens (mean {length['mean']:,.0f}, {span})")
        most = max((row["documents"] for row in figures["lengths"]), default=1)
        for row in figures["lengths"]:
            bar = "#" * max(1, round(40 * row["documents"] / most))
            put(f"{row['from']:>11,}  {row['documents']:>11,}  {bar}")
        put("\nsources")
        for source in figures["sources"]:
            weight = "" if source["weight"] is None else f"  weight {source['weight']:g}"
            name = one_line(source["name"])
            put(
                f"  {name:20} {count(source['tokens']):>8} tokens {source['share']:>6.1%}"
                f"  {source['documents']:>11,} documents"
                f"  {source['bytes_per_token']:.2f} bytes a token{weight}"
            )
        put("\nmost frequent tokens")
        for row in figures["frequent"][:10]:
            put(f"  {row['id']:>7} {row['piece']!r:16} {row['count']:>13,} {row['share']:>6.2%}")
        for sample in figures["samples"][:3]:
            text = " ".join(sample["text"].split())[:300]
            put(f"\n{one_line(sample['source'])}, {sample['tokens']:,} tokens: {text}")
        if self.html is not None:
            put(f"\npage  {self.html}")
