"""`mobilellm lab` as a person sees it: plan, question, progress, table.

status = run_lab(lab="table11", out=out, ...)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.lab.folder import LabFolder
from mobilellm.lab.lab_file import LabFile, read_lab
from mobilellm.lab.plan import make_plan
from mobilellm.lab.session import begin, go_on, measure_of, with_profile, write_outputs
from mobilellm.lab.work import Worked, work
from mobilellm.terminal.amounts import seconds_of
from mobilellm.terminal.lab_lines import plan_lines, table_lines
from mobilellm.terminal.lab_view import LabView
from mobilellm.terminal.output import print_json, progress, put, say
from mobilellm.terminal.run_end import EXIT_STATUS

SEEDS = 3


def run_lab(
    *,
    lab: str,
    out: Path | None,
    data: Path | None,
    budget: str,
    seeds: int | None,
    set_: dict[str, Any],
    profile: Path | None,
    runtime: str,
    plan: bool,
    yes: bool,
    retry: bool,
    json: bool,
) -> int:
    """Plan a lab and work on it, or go on with it; returns the exit status: 0 when all runs are
    finished, 1 when some failed or are left. The arguments are the verb's flags."""
    if out is None:
        raise UserError("no folder for the lab", hint="add --out labs/NAME")
    seconds = seconds_of(budget) if budget else None
    read = with_profile(read_lab(lab, set_), profile)
    if LabFolder.exists(out):
        folder = go_on(out, read, seeds, data)
        say(f"{out}: going on with {folder.plan['seeds']} seeds")
        if plan:
            return show(folder, read, json)
    else:
        LabFolder.check_free(out)
        if data is None:
            raise UserError("no data", hint="add --data FOLDER, made by `mobilellm prepare`")
        count = SEEDS if seeds is None else seeds
        measure, device = measure_of(read, runtime)
        with progress("measuring cells") as update:
            planned = make_plan(read, data, count, seconds, measure, update, device)
        for line in plan_lines(planned):
            (say if json else put)(line)
        if plan:
            return 0
        if not (yes or agreed()):
            say("nothing was begun")
            return 0
        folder = begin(out, planned)
    if retry:
        folder.forget_failures()

    def table() -> list[str]:
        return table_lines(write_outputs(folder, read), sys.stderr.isatty())

    with LabView(table) as view:
        worked = work(folder, seconds, view)
    status = show(folder, read, json)
    say_how_it_ended(worked, out)
    return EXIT_STATUS.get(worked.interrupted or "", status)


def agreed() -> bool:
    """Whether the person at the terminal wants it; without one nobody is asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    print("Begin? [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()  # nothing, not even a line's end, after Ctrl-D
    return answer != "" and answer.strip().lower() in ("", "y", "yes")


def show(folder: LabFolder, lab: LabFile, json: bool) -> int:
    """Print the table and write it."""
    table: Any = write_outputs(folder, lab)
    if json:
        print_json(table)
    else:
        # All names in these lines are made safe already; the grey is ours.
        print("\n".join(table_lines(table, sys.stdout.isatty())))
        put(f"\n{folder.path / 'table.json'}\n{folder.path / 'report.html'}")
    return 0 if table["done"] == table["runs"] else 1


def say_how_it_ended(worked: Worked, out: Path) -> None:
    """Why runs are left, where some are."""
    if worked.interrupted is not None:
        say(f"stopped by {worked.interrupted}; the same command goes on with {out}")
    elif worked.out_of_budget:
        say("the budget has no room for another run; the same command goes on")
    elif worked.elsewhere:
        say(f"{worked.elsewhere} runs are being trained by other processes")
    elif worked.failed:
        say(f"{len(worked.failed)} runs failed; --retry tries them again")
