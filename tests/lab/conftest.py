"""Fixtures of the lab's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.labs import LAB


@pytest.fixture
def lab_file(tmp_path: Path) -> Path:
    """The lab's file."""
    path = tmp_path / "depth.toml"
    path.write_text(LAB)
    return path
