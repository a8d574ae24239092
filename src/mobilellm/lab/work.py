"""Work on a lab: take run after run from its folder and train each, until none is left.

    done = work(folder, listener=Listener())
    done.finished, done.failed

A run is trained by the one function that trains all runs, and is gone on with where an earlier
process was stopped.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from typing import Any

from mobilellm.distributed.step_kernels import step_kernels
from mobilellm.errors import UserError, first_line
from mobilellm.files import read_json, write_json
from mobilellm.hardware.probes import pick_device
from mobilellm.lab.folder import Job, LabFolder, check_recipe
from mobilellm.train.rows import Watcher
from mobilellm.train.start import resume, train
from mobilellm.workflows.finish import finish
from mobilellm.workflows.quantized_scores import score_quantized


class Listener:
    """What a caller may want to see of a lab at work."""

    def began(self, job: Job, progress: Progress) -> Watcher:
        """Before a run; returns what watches its steps."""
        return Watcher()

    def ended(self, job: Job, why: str | None, progress: Progress) -> None:
        """After a run; `why` is None when it is finished."""


@dataclass
class Progress:
    """How far a lab is."""

    done: int
    failed: int
    runs: int
    seconds_left: float
    """Of the runs that are left, as planned, at the speed of those that are done."""


@dataclass
class Worked:
    """What one process did of a lab."""

    finished: int = 0
    failed: list[str] = field(default_factory=list)
    interrupted: str | None = None
    """The signal that stopped it, or none."""
    out_of_budget: bool = False
    """Whether runs are left that the budget had no room for."""
    elsewhere: int = 0
    """Runs that other processes were training when this one had nothing left."""
    seconds: float = 0.0
    training_seconds: float = 0.0


def progress_of(folder: LabFolder) -> Progress:
    """How far it is. Runs that others train count as left."""
    jobs = folder.jobs()
    done = [job for job in jobs if folder.is_done(job)]
    left = folder.left()
    return Progress(
        done=len(done),
        failed=len(jobs) - len(done) - len(left),
        runs=len(jobs),
        seconds_left=_slowdown(folder) * sum(job.seconds for job in left),
    )


def check_machine(folder: LabFolder) -> None:
    """`UserError` where this machine cannot compute the runs that are left alike: the plan, which
    may be another machine's, says what compiles and what multiplies."""
    for recipe in {job.recipe.train: job.recipe for job in folder.left()}.values():
        try:
            step_kernels(recipe, pick_device())
        except UserError as error:
            raise UserError(
                f"{folder.path}: this machine cannot compute its runs: {error}",
                hint="go on where it was planned, or begin another lab with "
                "--set train.compile=off train.products=torch train.attention=torch",
            ) from None


def _slowdown(folder: LabFolder) -> float:
    """How much longer than planned the runs that are done took."""
    done = [job for job in folder.jobs() if folder.is_done(job)]
    planned = sum(job.seconds for job in done)
    return sum(folder.seconds_of(job) for job in done) / planned if planned else 1.0


def work(
    folder: LabFolder, budget: float | None = None, listener: Listener | None = None
) -> Worked:
    """Train what nobody trains yet. No run is begun that would end after `budget` seconds.

    A run that fails is recorded, and the others go on. `UserError` for a run of the folder that
    was edited while it was unfinished, and on a machine that cannot compute as the plan has it.
    """
    check_machine(folder)
    listener, worked, begun = listener or Listener(), Worked(), time.perf_counter()
    while True:
        with folder.claim() as job:
            worked.seconds = time.perf_counter() - begun
            if job is None:
                break
            expected = _slowdown(folder) * job.seconds
            if budget is not None and worked.seconds + expected > budget:
                worked.out_of_budget = True
                break
            why = _train(folder, job, listener.began(job, progress_of(folder)), worked)
        if worked.interrupted is not None:
            break
        listener.ended(job, why, progress_of(folder))
    worked.seconds = time.perf_counter() - begun
    if worked.interrupted is None and not worked.out_of_budget:
        worked.elsewhere = len(folder.left())
    return worked


def _train(folder: LabFolder, job: Job, watcher: Watcher, worked: Worked) -> str | None:
    """Train one run to its end; returns why it failed, or None."""
    run, begun = folder.run(job), time.perf_counter()
    going_on = (run / "recipe.toml").is_file()
    if going_on:
        check_recipe(run, job)
    elif run.is_dir() and not (run / "metrics.jsonl").exists():
        shutil.rmtree(run)  # a kill while it was being made: nothing was trained
    try:
        outcome = resume(run, watcher) if going_on else train(run, job.recipe, watcher)
        worked.training_seconds += outcome.seconds
        if outcome.interrupted is not None:
            worked.interrupted = outcome.interrupted
            return None
        known = _baselines(folder)
        result = finish(outcome, known=known, sampled=False)
        if schemes := folder.plan["content"].get("quantized"):
            score_quantized(run, schemes)
    except KeyboardInterrupt:
        worked.interrupted = "SIGINT"
        return None
    except UserError as error:
        why = str(error)
    except Exception as error:  # a fault of one cell, whatever it is, is not the end of the others
        why = f"{type(error).__name__}: {first_line(error)}"
    else:
        if known is None:
            write_json(folder.path / "baselines.json", result["baselines"])
        folder.finish(job, time.perf_counter() - begun)
        worked.finished += 1
        return None
    folder.fail(job, why)
    worked.failed.append(job.name)
    return why


def _baselines(folder: LabFolder) -> dict[str, Any] | None:
    """Baselines of the data, the same for all runs, once one has computed them."""
    path = folder.path / "baselines.json"
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else None
