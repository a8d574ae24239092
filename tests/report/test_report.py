"""The report: whole, self-contained, escaped, quick and small whatever the run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mobilellm.report import write_report
from mobilellm.report.chart import Line, line_chart, smooth, thin, ticks

VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects faults of nesting, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action") or "url(" in str(value):
                self.faults.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(folder: Path, steps: int, result: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 7 / step**0.2, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": step * 100,
                   "tokens_per_second": 5000.0, "seconds": step}  # fmt: skip
            if step % max(1, steps // 10) == 0:
                row |= {
                    "held_out_loss": 3.0,
                    "held_out_bits_per_byte": 2.0,
                    "held_out_perplexity": 20.0,
                }
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 99, "lo')  # a kill cut it off
    (folder / "recipe.toml").write_text("[train]\nsteps = 5 # <b>\n")
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2", "command": ["a", "b"], "commit": None})
    )
    if result:
        model = {"preset": "1M", "layers": 6, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 352, "vocab_size": 300, "max_position_embeddings": 512, "layer_repeats": 2,
                 "parameters": {"embedding": 10, "attention": 20, "lm_head": 0, "total": 30}, "memory_bytes": {"fp32": 120},
                 "flops_per_token": {"six_n": 180, "palm": 300}, "kv_cache_bytes_per_token": 64}  # fmt: skip
        sample = {
            "prompt": "<script>alert(1)</script>",
            "text": "</blockquote>&amp;",
            "temperature": 1,
            "top_p": 1,
            "seed": 0,
        }
        values = {
            "name": "<i>run</i>", "finished": "2026-01-01T00:00:00+00:00", "checkpoint": "c", "model": model, "samples": [sample],
            "held_out": {"loss": 3.0, "perplexity": 20.0, "bits_per_byte": 2.0, "tokens": 10, "bytes": 40},
            "baselines": {"unigram": 4.0, "gzip": 3.0, "xz": 2.9, "bytes_compressed": 40},
            "training": {"steps": 5, "tokens": 500, "seconds": 60.0, "tokens_per_second": 8.3},
            "data": {"sources": [{"name": "s", "documents": 1, "tokens": 2, "bytes": 3}],
                     "tokenizer": {"name": "t", "vocab_size": 300}, "train_tokens": 2, "held_out_tokens": 1,
                     "bytes_per_token": 1.5, "held_out": {"rule": "tail", "fraction": 0.1}},
            "next": [{"what": "Go", "command": "mobilellm info <x>"}],
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(values))
    return folder


def check(path: Path) -> Checker:
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.faults
    assert not checker.open
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    return checker


@pytest.mark.parametrize(
    ("steps", "result"), [(50, True), (50, False), (1, False), (0, False), (0, True)]
)
def test_page_is_whole_self_contained_and_escaped(tmp_path: Path, steps: int, result: bool) -> None:
    checker = check(write_report(make_run(tmp_path / "run", steps, result)))
    assert "<script>alert(1)</script>" not in (tmp_path / "run/report.html").read_text()
    assert "1 line of the metrics could not be read" in checker.text
    if result:
        assert "<script>alert(1)</script>" in checker.text  # as text, which is what a reader sees
        assert "</blockquote>&amp;" in checker.text


def test_an_empty_run_gives_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "not finished" in check(write_report(tmp_path / "run")).text


def test_long_runs_give_small_pages(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", 60_000))
    check(path)
    assert path.stat().st_size < 1_000_000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 100)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_thinning_keeps_every_spike() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[77_777] = (77_777.0, -5.0)
    kept = thin(points)
    assert len(kept) < 700
    assert (54_321.0, 9.0) in kept
    assert (77_777.0, -5.0) in kept


def test_smoothing_of_a_constant_is_the_constant() -> None:
    assert [y for _, y in smooth([(float(i), 3.0) for i in range(10)], 4)] == pytest.approx(
        [3.0] * 10
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.3, 7.9), (0, 1e-3), (-5, 5), (1000, 120_000), (3, 3)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    assert 1 <= len(found) <= 11


def test_points_that_are_not_finite_are_left_out() -> None:
    svg = line_chart("t", [Line("l", [(0, 1.0), (1, float("nan")), (2, 2.0)], "c1")], "x", "y")
    assert "nan" not in re.sub(r"[a-z]*anchor[a-z]*", "", svg)
    assert line_chart("t", [], "x", "y") == ""
