"""How soon a page writes: a model of 5 million parameters in a fresh tab, from file://.

    python benchmarks/page.py --save benchmarks/results/page.json
    python benchmarks/page.py --preset 1M --repeats 1

A random network of the preset with a tokenizer of 2,048 tokens becomes one .html file. Each repeat
starts a Chromium of its own with an empty profile, opens the file, sends a prompt as soon as the
page takes one, and counts from the navigation to the first token that is shown.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import statistics
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mobilellm.files import write_json
from mobilellm.hardware.description import describe
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.export.browser import Browser

VOCABULARY = 2048
ASK = """
document.getElementById('prompt').value = 'Once upon a time';
document.getElementById('ask').requestSubmit()
"""


def page_file(folder: Path, preset: str) -> Path:
    """The page of a random network."""
    text = gzip.decompress(
        (files("mobilellm") / "sample" / "tiny_shakespeare.txt.gz").read_bytes()
    ).decode()
    tokenizer = train_bpe([text[:400_000]], VOCABULARY)
    torch.manual_seed(0)
    network = Network(ModelConfig.preset(preset, vocab_size=tokenizer.vocab_size)).eval()
    (folder / "model").mkdir()
    save_checkpoint(folder / "model", network, tokenizer, {"made_by": Path(__file__).name})
    convert(folder / "model", folder / "page.html", "web", verify=False)
    return folder / "page.html"


def once(page: Path) -> dict[str, float]:
    """Seconds from the navigation until the page is ready, and until its first token."""
    with Browser() as browser:
        tab = browser.open(page.as_uri())
        tab.wait("globalThis.ready || globalThis.failed", 120)
        # The likeliest tokens of a random network repeat the prompt's last; drawn ones may be bytes
        # that are no text, and then nothing is shown.
        tab.evaluate("document.getElementById('tokens').value = 16")
        tab.evaluate("document.getElementById('temperature').value = 0")
        tab.evaluate(ASK)
        found = tab.wait("globalThis.written", 120)
        return {
            "ready_s": tab.evaluate("globalThis.ready") / 1e3,
            "first_token_after_asking_ms": found["first_ms"],
            "first_token_s": found["at"] / 1e3,
            "tokens_per_second": found["tokens_per_second"],
        }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="5M")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = page_file(Path(folder), arguments.preset)
        size = page.stat().st_size
        runs = [once(page) for _ in range(arguments.repeats)]
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    print(f"{arguments.preset}: {size / 1e6:.1f} MB; " + ", ".join(
        f"{key} {value:.2f}" for key, value in medians.items()
    ))  # fmt: skip
    if arguments.save:
        record: dict[str, Any] = {
            "benchmark": "page",
            "date": datetime.date.today().isoformat(),
            "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"},
            "preset": arguments.preset,
            "bytes": size,
            "medians": medians,
            "runs": runs,
        }
        write_json(arguments.save, record)


if __name__ == "__main__":
    main()
