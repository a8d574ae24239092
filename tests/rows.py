"""Files of JSON lines, which tests write and our commands read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """One value a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
