"""Where the time of a run goes, by operator, where the runtime tells.

    rows = operators(session, prompt_ids)     # [{"phase", "name", "ms", "share", "calls"}, ...]

Our own network tells by torch's profiler. The other runtimes' own programs tell more of themselves
than their Python packages do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mobilellm.errors import UserError
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.session import Session

MOST = 10
"""Operators of a phase that are told."""
STEP = "decoding/step.cpp"
TOKENS = 8
"""Tokens of the decode phase; its figures are means over them."""


def operators(session: Session, prompt: Sequence[int]) -> list[dict[str, Any]]:
    """The operators that take most of a prompt and of single tokens after it, in milliseconds a
    run. `UserError` for a runtime that does not tell."""
    if not isinstance(session, NetworkSession):
        raise UserError("this runtime does not tell", hint="only our own network does")
    from torch.profiler import ProfilerActivity, profile, record_function

    session.feed(prompt)  # what is prepared for a shape when it is first met
    session.reset()
    found: list[dict[str, Any]] = []
    for phase, runs in (("prefill", 1), ("decode", TOKENS)):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(runs):
                # What a token takes outside of torch's operators is the compiled step's.
                stepped = phase == "decode" and session.decoder is not None
                with record_function(STEP) if stepped else contextlib.nullcontext():
                    session.feed(prompt if phase == "prefill" else prompt[:1])
        events = [event for event in recorded.key_averages() if event.self_cpu_time_total > 0]
        total = sum(event.self_cpu_time_total for event in events) or 1.0
        events.sort(key=lambda event: -event.self_cpu_time_total)
        found += [
            {
                "phase": phase,
                "name": event.key,
                "ms": event.self_cpu_time_total / 1e3 / runs,
                "share": event.self_cpu_time_total / total,
                "calls": event.count / runs,
            }
            for event in events[:MOST]
        ]
    return found
