"""What the tests of pages share: a run's folder, and a reader of HTML."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects faults of nesting, tags, attributes, text, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("src", "href", "action") or "url(" in str(value):
                self.faults.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data


def parsed(page: str) -> Checker:
    """The page, read."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    return checker


def check(path: Path) -> Checker:
    """A page, which must be well nested and fetch nothing."""
    page = path.read_text()
    checker = parsed(page)
    assert not checker.faults
    assert not checker.open
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    return checker


def metrics(steps: int) -> list[dict[str, Any]]:
    """Rows of a run, each tenth part with a held-out score."""
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss": 7 / step**0.2,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens": step * 100,
            "tokens_per_second": 5000.0,
            "seconds": step,
        }
        if step % max(1, steps // 10) == 0:
            row |= {
                "held_out_loss": 3.0,
                "held_out_bits_per_byte": 2.0,
                "held_out_perplexity": 20.0,
            }
        rows.append(row)
    return rows


def result() -> dict[str, Any]:
    """A finished run's result.json."""
    return {
        "name": "<i>run</i>",
        "finished": "2026-01-01T00:00:00+00:00",
        "checkpoint": "c",
        "model": {
            "preset": "1M",
            "layers": 6,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 352,
            "vocab_size": 300,
            "max_position_embeddings": 512,
            "layer_repeats": 2,
            "parameters": {"embedding": 10, "attention": 20, "lm_head": 0, "total": 30},
            "memory_bytes": {"fp32": 120},
            "flops_per_token": {"six_n": 180, "palm": 300},
            "kv_cache_bytes_per_token": 64,
        },
        "samples": [
            {
                "prompt": "<script>alert(1)</script>",
                "text": "</blockquote>&amp;",
                "temperature": 1,
                "top_k": 0,
                "top_p": 1,
                "seed": 0,
            }
        ],
        "held_out": {
            "loss": 3.0,
            "perplexity": 20.0,
            "bits_per_byte": 2.0,
            "tokens": 10,
            "bytes": 40,
        },
        "held_out_before": {
            "loss": 4.0,
            "perplexity": 50.0,
            "bits_per_byte": 3.0,
            "tokens": 10,
            "bytes": 40,
        },
        "conversations": [
            {"asked": "<|user|> a", "said": "<b>", "base": "<script>", "tuned": "c"},
        ],
        "baselines": {"unigram": 4.0, "gzip": 3.0, "xz": 2.9, "bytes_compressed": 40},
        "training": {"steps": 5, "tokens": 500, "seconds": 60.0, "tokens_per_second": 8.3},
        "data": {
            "sources": [{"name": "s", "documents": 1, "tokens": 2, "bytes": 3}],
            "tokenizer": {"name": "t", "vocab_size": 300},
            "train_tokens": 2,
            "held_out_tokens": 1,
            "bytes_per_token": 1.5,
            "scored": "held-out answers",
            "held_out": {"rule": "tail", "fraction": 0.1},
        },
        "next": [{"what": "Go", "command": "mobilellm info <x>"}],
    }


ENVIRONMENT = {"torch": "2", "command": ["a", "b"], "commit": None, "cores": 2}
RECIPE = "[train]\nsteps = 5 # <b>\n"


def make_run(
    folder: Path,
    rows: list[dict[str, Any]],
    result: dict[str, Any] | None = None,
    environment: dict[str, Any] = ENVIRONMENT,
    recipe: str = RECIPE,
) -> Path:
    """A run's folder; a kill cut off the last line of its metrics."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "lo']))
    (folder / "recipe.toml").write_text(recipe)
    (folder / "environment.json").write_text(json.dumps(environment))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder
