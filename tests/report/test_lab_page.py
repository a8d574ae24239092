"""The page of a lab: the table, what is grey, bands over seeds, and that it fits a phone."""

import copy
import re
from pathlib import Path

import pytest
from tests.export.browser import Browser
from tests.report.pages import check
from tests.report.test_hostile import LAB, lab_page

from mobilellm.report.lab_page import write_lab_page

CURVES = {
    f"cell {n}": [[(t * 1e5, 3 - 0.1 * t + 0.01 * n + 0.05 * seed) for t in range(1, 9)]
                  for seed in range(3)]
    for n in range(9)
}  # fmt: skip


def test_the_table_says_what_is_equal_grey_and_published(tmp_path: Path) -> None:
    page = lab_page(tmp_path, LAB)[0]
    text = check(tmp_path / "page.html").text
    for words in (
        "All cells have the same parameters",
        "against base",
        "-0.0200 to +0.0100",
        "2 (4 applied)",
        "over 3 cells: 0.50",
        "0.50, 1.00",
        "other, seed 1: w",
        "3 of 4 runs, unfinished",
        "0.2000",
    ):
        assert words in text, words
    assert len(re.findall(r'<td class="noise">', page)) == 2
    clear = copy.deepcopy(LAB)
    clear["rows"][1]["metrics"]["k"]["difference"] |= {"high": -0.001, "in_noise": False}
    assert '<td class="noise">' not in lab_page(tmp_path, clear)[0]


def test_curves_are_means_with_bands_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    write_lab_page(tmp_path / "page.html", LAB, CURVES)
    page = (tmp_path / "page.html").read_text()
    assert page.count('<polygon class="band') == 9 + 1  # and the one of the intervals
    assert page.count('dashed" points') == 4  # cells beyond the colors
    first = re.search(r"\[&#34;cell 0&#34;, \[\[100000.0, ([\d.]+)\]", page)
    assert first is not None
    assert float(first[1]) == pytest.approx(2.95)
    half_done = {"a": [CURVES["cell 0"][0], CURVES["cell 0"][1][:3]], "b": []}
    write_lab_page(tmp_path / "page.html", LAB, half_done)
    check(tmp_path / "page.html")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(browser: Browser, tmp_path: Path, dark: bool) -> None:
    write_lab_page(tmp_path / "page.html", LAB | {"title": "Depth against width"}, CURVES)
    page = browser.open((tmp_path / "page.html").as_uri(), width=360, dark=dark)
    page.wait("document.readyState === 'complete'")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.querySelector('polygon.band')).stroke") == (
        "none"
    )
