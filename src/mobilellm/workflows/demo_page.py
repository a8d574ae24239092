"""The end of a quickstart: a page in which the new model writes, linked from the run's report.

write_demo_page(Path("runs/demo"))      # runs/demo/demo.html, and the report anew
"""

from __future__ import annotations

from pathlib import Path

from mobilellm.report.run_page import DEMO_PAGE, write_report
from mobilellm.workflows.convert import convert


def write_demo_page(run: Path) -> Path:
    """The page of a finished run, which is written unless it is there.

    `UserError` when it cannot be: the engine cannot be had, or the model is too large for a page.
    """
    page = run / DEMO_PAGE
    if not page.exists():
        convert(run, page, "web")
        write_report(run)
    return page
