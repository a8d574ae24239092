"""`mobilellm data-stats`: what prepared data consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

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
        from mobilellm.terminal.data_lines import print_statistics

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
        print_statistics(figures)
        if self.html is not None:
            put(f"\npage  {self.html}")
        return 0
