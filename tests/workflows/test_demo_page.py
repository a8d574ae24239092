"""The page at the end of a quickstart: beside the report and linked from it, or a line instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network

from mobilellm.cli.quickstart import Quickstart
from mobilellm.errors import UserError
from mobilellm.export import web
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.demo_page import write_demo_page

LINK = '<a href="demo.html">'


@pytest.fixture
def run(tmp_path: Path, sample_text: str) -> Path:
    """As much of a finished run as there needs to be."""
    return checkpoint(tmp_path / "run", network(), train_bpe([sample_text[:30_000]], 300))


def parts(*_: object) -> tuple[dict[str, bytes], str]:
    return {"engine": b"a part"}, "a licence"


def test_the_page_lies_beside_the_report_which_links_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "engine_parts", parts)
    page = write_demo_page(run)
    assert page == run / "demo.html"
    assert (run / "report.html").read_text().count(LINK) == 1
    before = page.stat().st_mtime_ns
    write_demo_page(run)
    assert page.stat().st_mtime_ns == before


def test_without_an_engine_the_quickstart_says_so_and_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise UserError("no npm", hint="install it")

    monkeypatch.setattr(web, "engine_parts", refused)
    Quickstart(out=run).page()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("without the page that runs the model in a browser: no npm; install it")
    assert not (run / "demo.html").exists()
