"""The HTML report of a run: reads the run folder, writes one self-contained page."""

from mobilellm.report.page import write_report

__all__ = ["write_report"]
