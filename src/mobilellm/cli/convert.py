"""`mobilellm convert`: other people's formats in and out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert."""

    source: tyro.conf.Positional[Path]
    """In."""
    out: tyro.conf.Positional[Path]
    """Out."""
    to: Literal["hf", "gguf", "llama2c", "mobilellm"] = "hf"
    """Format."""

    def run(self) -> int:
        """Convert."""
        return 0
