"""`mobilellm report`: a run's page anew, or several runs on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.errors import UserError
from mobilellm.printable import one_line
from mobilellm.records import check_run
from mobilellm.terminal.output import print_json, put, say


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write the HTML report of a run, finished or not; or one page with the curves of several.

    Example: mobilellm report runs/a runs/b --out comparison.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """Page to write; for a single run it is report.html in its folder."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Write and name the page."""
        from mobilellm.report.comparison_page import write_comparison
        from mobilellm.report.run_files import RunFiles
        from mobilellm.report.run_page import write_report

        if not self.runs:
            raise UserError("no run given", hint="name one or more run folders")
        for run in self.runs:
            check_run(run)
        if len(self.runs) > 1 and self.out is None:
            raise UserError(
                "no name for the page of several runs", hint="add --out comparison.html"
            )
        path = (
            write_report(self.runs[0])
            if self.out is None
            else write_comparison(self.runs, self.out)
        )
        for run in self.runs:
            for line in RunFiles.read(run).damaged:
                say(one_line(f"mobilellm: note: {line}; left out of the page"))
        if self.json:
            print_json({"report": str(path)})
        else:
            put(path)
        return 0
