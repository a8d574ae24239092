"""Signals that end a run after the step in progress.

with StopRequest() as stop:
    ...
    if stop.code: ...           # its place in SIGNALS, from 1
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers SIGINT, SIGTERM or SIGUSR1, so that the step in progress is finished; a second
    SIGINT acts at once."""

    def __init__(self) -> None:
        self.code = 0
        """Place in SIGNALS, from 1; 0 is none."""
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            try:
                self.previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: there the caller's handling stays
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        # torchrun and schedulers repeat their signals; only a person who presses Ctrl-C twice wants
        # no checkpoint.
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = max(self.code, SIGNALS.index(signal.Signals(number)) + 1)
