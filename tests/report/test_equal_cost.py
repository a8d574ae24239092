"""Runs compared at equal tokens and at equal FLOPs, their teachers' included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.report.pages import make_run, result

from mobilellm.report.comparison_page import at_equal_cost, write_comparison
from mobilellm.report.run_files import RunFiles


def run(folder: Path, tokens: int, teacher_flops: int | None) -> Path:
    """A run of 180 FLOPs a token, scored every 100 tokens."""
    rows: list[dict[str, Any]] = [
        {"step": i, "tokens": i * 100, "held_out_bits_per_byte": 4 - i / 10}
        for i in range(1, tokens // 100 + 1)
    ]
    found = result()
    found["training"] |= {"tokens": tokens}
    if teacher_flops is not None:
        found["training"]["teacher_flops"] = teacher_flops
    return make_run(folder, rows, found)


def test_the_teachers_share_counts(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", 500, None)
    taught = run(tmp_path / "taught", 1000, 180 * 1000)  # twice as much a token
    assert at_equal_cost([RunFiles.read(alone), RunFiles.read(taught)]) == [
        ["3.5000", "3.5000"],
        ["3.5000", "3.8000"],  # 250 tokens cost as much as the other's 500
    ]
    page = write_comparison([alone, taught], tmp_path / "c.html").read_text()
    assert "held-out at equal FLOPs" in page
    assert "<td>3.8000</td>" in page


def test_a_run_without_an_end_has_no_flops(tmp_path: Path) -> None:
    rows = [{"step": 1, "tokens": 100, "held_out_bits_per_byte": 3.0}]
    unfinished = RunFiles.read(make_run(tmp_path / "u", rows))
    ended = RunFiles.read(run(tmp_path / "e", 300, None))
    assert at_equal_cost([unfinished, ended]) == [["3.0000", "-"], ["3.9000", "3.7000"]]
