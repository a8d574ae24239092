"""Every page in a real browser, with a script in every string of every input: none of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.export.browser import Browser
from tests.report.test_hostile import INPUTS, leaves, poisoned, with_hostile_keys

from mobilellm.report.score_table import measured_row, published_rows
from mobilellm.report.scores_page import page as scores_page

pytestmark = pytest.mark.long
RUNS = (
    "\"'></td></pre></title></style></script><script>globalThis.ran = 1; document.title = 'PWNED'"
    "</script><img src=x onerror='globalThis.ran = 2'><svg onload='globalThis.ran = 3'>"
)


def look(browser: Browser, file: Path) -> list[str]:
    """What a page complained of; the test fails where a script of others ran, or anything was
    asked for."""
    page = browser.open(file.as_uri())
    page.wait("document.readyState == 'complete'", 30)
    assert page.evaluate("globalThis.ran ?? 0") == 0
    assert page.evaluate("document.title") != "PWNED"
    # Chromium tells of a request that the policy forbids, too, which is then never made.
    forbidden = any("Content Security Policy" in problem for problem in page.problems)
    assert page.requests == [file.as_uri()] or forbidden
    return page.problems


@pytest.mark.parametrize("name", INPUTS)
def test_no_script_of_others_runs_in_any_page(browser: Browser, tmp_path: Path, name: str) -> None:
    value, pages = INPUTS[name]
    everywhere = poisoned(value, list(leaves(value)), RUNS)
    shown = name == "metrics"  # whose rows are left out where they hold no numbers
    for number, variant in enumerate((everywhere, with_hostile_keys(everywhere))):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place, text in enumerate(pages(folder, variant)):
            file = tmp_path / f"{name}-{number}-{place}.html"
            file.write_text(text)
            shown = shown or "globalThis.ran" in text
            assert look(browser, file) == []  # the policy had nothing to forbid: all is escaped
    assert shown


def test_no_script_of_others_runs_in_the_page_of_scores(browser: Browser, tmp_path: Path) -> None:
    score = {"acc": 0.5, "acc_stderr": 0.1, "split": RUNS, "count": RUNS}
    facts = {"protocol": RUNS, "harness": RUNS}
    row = measured_row(RUNS, {RUNS: score | facts, "average": {"acc": 0.5} | facts})
    file = tmp_path / "scores.html"
    file.write_text(scores_page([row, *published_rows()], RUNS))
    assert look(browser, file) == []


def test_the_policy_stops_what_was_not_escaped(browser: Browser, tmp_path: Path) -> None:
    """The second line of defence, tried alone: markup put into a finished page by hand."""
    file = tmp_path / "scores.html"
    file.write_text(scores_page(published_rows()).replace("<body>", f"<body>{RUNS}", 1))
    assert "<script>globalThis.ran" in file.read_text()
    problems = look(browser, file)
    assert any("Content Security Policy" in problem for problem in problems)
