"""How a run ended, as `train` and `quickstart` print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobilellm.report.figures import count, fixed, formatted
from mobilellm.terminal.output import duration, print_json, put, say

if TYPE_CHECKING:
    from mobilellm.records import Result
    from mobilellm.train.loop import Outcome

EXIT_STATUS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 75}
"""Signal that ended the work -> status; 75 (try again later) is for the signal by which schedulers
announce a time limit."""


def exit_status(outcome: Outcome) -> int:
    """0 when the run is at its end, else a status that names the signal."""
    return 0 if outcome.interrupted is None else EXIT_STATUS[outcome.interrupted]


def conclude(outcome: Outcome, result: Result, json: bool) -> int:
    """Print how a run ended; returns the exit status."""
    if json:
        facts = {
            "run": str(outcome.run),
            "step": outcome.step,
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "seconds": round(outcome.seconds, 3),
            "checkpoint": str(outcome.checkpoint),
            "interrupted": outcome.interrupted,
            "held_out": result.get("held_out"),
        }
        print_json(facts)
    if outcome.interrupted:
        say(
            f"stopped by {outcome.interrupted} after step {outcome.step} of {outcome.steps}; "
            f"saved {outcome.checkpoint}"
        )
        say(f"go on with: mobilellm train --resume {outcome.run}")
        return exit_status(outcome)
    if not json:
        held_out = result["held_out"]
        put(
            f"{outcome.steps} steps, {count(outcome.tokens)} tokens in "
            f"{duration(outcome.seconds)}; held-out "
            f"{formatted(held_out['bits_per_byte'], '.4f')} bits a byte, "
            f"perplexity {fixed(held_out['perplexity'], 2)}"
        )
        put(f"checkpoint {outcome.checkpoint}\nreport     {outcome.run / 'report.html'}")
    return 0
