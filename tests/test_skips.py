"""What skips for want of the data beside the checkout fails where CI=true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASKS_FOR_DATA = "tests/report/test_score_table.py::test_the_rows_equal_the_originals_text"


@pytest.mark.parametrize(
    ("ci", "data", "status", "word"),
    [("true", False, 1, "1 error"), ("", False, 0, "1 skipped"), ("true", True, 5, "deselected")],
)
def test_a_skip_for_want_of_data_fails_in_ci(
    tmp_path: Path, ci: str, data: bool, status: int, word: str
) -> None:
    """In CI the only way to do without the data is to deselect its tests, which is seen (5: nothing
    was run)."""
    environment = os.environ | {"CI": ci, "MOBILELLM_SHARED": str(tmp_path)}
    more = ["-m", "not shared"] if data else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ASKS_FOR_DATA, *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout[-2000:]
    assert word in done.stdout
