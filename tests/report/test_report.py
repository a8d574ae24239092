"""The report: whole, self-contained, escaped, quick and small whatever the run."""

import re
from pathlib import Path

import pytest
from tests.report.pages import check, make_run, metrics, result

from mobilellm.report.chart import Line, bar_chart, line_chart, smooth, thin, ticks
from mobilellm.report.comparison_page import write_comparison
from mobilellm.report.figures import count, fixed, grouped, percent, ratio
from mobilellm.report.run_page import write_report


@pytest.mark.parametrize(
    ("steps", "finished"), [(50, True), (50, False), (1, False), (0, False), (0, True)]
)
def test_page_is_whole_self_contained_and_escaped(
    tmp_path: Path, steps: int, finished: bool
) -> None:
    run = make_run(tmp_path / "run", metrics(steps), result() if finished else None)
    checker = check(write_report(run))
    assert "<script>alert(1)</script>" not in (tmp_path / "run/report.html").read_text()
    assert "1 line of the metrics could not be read" in checker.text
    if finished:
        assert "<script>alert(1)</script>" in checker.text  # as text, which is what a reader sees
        assert "</blockquote>&amp;" in checker.text


def test_an_empty_run_gives_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "not finished" in check(write_report(tmp_path / "run")).text


def test_long_runs_give_small_pages(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run", metrics(60_000), result()))
    check(path)
    assert path.stat().st_size < 1_000_000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics(100), result())
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


def test_the_page_states_the_figures_of_the_run(tmp_path: Path) -> None:
    text = check(write_report(make_run(tmp_path / "run", metrics(50), result()))).text
    for figure in (
        "2.000bits a byte",
        "20.00perplexitya token, over 10",
        "30parameters6 layers, 128 wide",
        "500tokens trained onin 5 steps",
        "8tokens a second1.0 minutes",
        "unigram (token frequencies)4.000gzip -93.000xz -9e2.900this model2.000",
        "- attention20 (66.7%)",
        "each block applied2 times",
        "training FLOPs a token180 (6N), 300 with attention",
        "source s1 documents, 2 tokens, 3 bytes",
        "1 tokens: the tail of the text, 0.1 of all",
        "commitnone",
        "commanda b",
    ):
        assert figure in text.replace("\n", "")


def test_a_run_that_goes_on_shows_what_it_has(tmp_path: Path) -> None:
    text = check(write_report(make_run(tmp_path / "run", metrics(50)))).text.replace("\n", "")
    assert "not finished" in text
    assert "5ktokens trained onin 50 steps" in text
    assert "5,000tokens a second" in text


def test_a_comparison_shows_final_figures_and_what_differs(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", metrics(50), result())
    second = make_run(tmp_path / "b", metrics(20), recipe="[train]\nsteps = 6\nseed = 0\n")
    path = write_comparison([first, second], tmp_path / "page.html")
    text = check(path).text.replace("\n", "")
    assert "a505k3.20112.00008" in text
    assert "b202k3.84502.00005,000" in text
    assert "train.steps5 # <b>6" in text
    assert "train.seed-0" in text
    assert check(path).tags.count("svg") == 6


def test_numbers_that_are_not_finite_are_shown_as_such() -> None:
    assert [fixed(v, 2) for v in (1234.567, None, float("inf"), "<b>")] == [
        "1,234.57",
        "not finite",
        "not finite",
        "<b>",
    ]
    assert (grouped(12_345_678), grouped(5.0), grouped(None)) == ("12,345,678", "5", "not finite")
    assert (percent(0.125), percent(ratio(1, 0))) == ("12.5%", "not finite")
    assert [count(n) for n in (999, 12_345_678, -4200, 2e12, 1e-05)] == [
        "999",
        "12.3M",
        "-4.2k",
        "2T",
        "1e-05",
    ]
    bars = bar_chart([("a", 2.0, False), ("b", None, True)], "u")
    assert "not finite" in bars
    assert [float(w) for w in re.findall(r"width:([0-9.]+)%", bars)] == [100.0, 0.0]


def test_ticks_that_are_close_have_labels_of_their_own() -> None:
    svg = line_chart("t", [Line("l", [(100_000, 1.0), (102_000, 2.0)], "c1")], "x", "y")
    labels = re.findall(r'"middle">([^<]*)</text>', svg)
    assert len(set(labels)) == len(labels) > 3
