"""`mobilellm watch`: a run's curves in the terminal, while it trains."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from mobilellm.errors import UserError
from mobilellm.printable import printable
from mobilellm.records import check_run
from mobilellm.terminal.output import put
from mobilellm.terminal.run_picture import picture


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Draw the curves of a run in the terminal, live until it ends or Ctrl-C.

    Example: mobilellm watch runs/book
    """

    run_folder: tyro.conf.Positional[Path]
    """Run folder."""
    every: float = 1.0
    """Seconds between looks."""
    once: bool = False
    """Draw once and end, as is done anyway when the output is no terminal."""

    def run(self) -> int:
        """Watch; 0 at the run's end, 130 after Ctrl-C."""
        check_run(self.run_folder)
        if not self.every > 0:
            raise UserError(f"--every {self.every}: must be a number of seconds above 0")
        if self.once or not sys.stdout.isatty():
            put(picture(self.run_folder, 80, 30))
            return 0
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        with Live(console=Console(), screen=False, auto_refresh=False) as live:
            while True:
                size = shutil.get_terminal_size()
                live.update(
                    Text(
                        printable(
                            picture(self.run_folder, min(size.columns - 1, 160), size.lines - 2)
                        )
                    ),
                    refresh=True,
                )
                if (self.run_folder / "result.json").is_file():
                    return 0
                time.sleep(self.every)
