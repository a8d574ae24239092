"""A lab on disk: its plan, the runs of its cells, and who trains what.

    OUT/
      lab.json             the plan: every cell's recipe and what was measured of it
      runs/NAME/           an ordinary run folder for each cell and seed
      claims/NAME.json     which process trains it; made by one that created it, atomically
      done/NAME.json       SHA-256 of what the finished run left
      failed/NAME.json     why a run ended otherwise
      table.json, report.html

Several processes, on several machines that see the folder, take runs from it. A claim is made anew
every few seconds by who holds it; one that was left by a process that died, or was not renewed for
`STALE_SECONDS`, is taken over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import orjson

from mobilellm.errors import UserError
from mobilellm.files import disk_errors, locked, read_json, sha256_file, write_json
from mobilellm.lab.lab_file import LabFile
from mobilellm.lab.plan import LabPlan, plan_facts
from mobilellm.recipe.recipe import Recipe
from mobilellm.schema import checked
from mobilellm.train.run_folder import now, read_recipe
from mobilellm.version import __version__

FORMAT, FORMAT_VERSION = "mobilellm lab", 1
STALE_SECONDS = 120.0
"""Without a sign of life of another machine's process."""
BEAT_SECONDS = 10.0
KEPT = ("recipe.toml", "result.json", "metrics.jsonl")
"""Files of a finished run that must stay as they are."""


class CellFacts(TypedDict):
    """A cell in lab.json."""

    name: str
    slug: str
    recipe: dict[str, Any]
    facts: dict[str, Any]
    seconds: float


class LabFacts(TypedDict):
    """lab.json."""

    format: str
    format_version: int
    made_by: str
    date: str
    content: dict[str, Any]
    """What the lab's file says, by which another lab is told from it."""
    seeds: int
    device: str
    profile_device: str
    data_fingerprint: str
    cells: list[CellFacts]


class DoneFacts(TypedDict):
    """A file in done/."""

    cell: str
    seed: int
    seconds: float
    files: dict[str, str]
    """Name -> SHA-256."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a cell with a seed."""

    cell: str
    seed: int
    slug: str
    recipe: Recipe
    seconds: float
    """As planned."""

    @property
    def name(self) -> str:
        """Of its run folder, claim and record."""
        return f"{self.slug}-seed{self.seed}"


class LabFolder:
    """A lab that has begun."""

    def __init__(self, path: Path, plan: LabFacts) -> None:
        self.path, self.plan = path, plan
        self.recipes = {
            cell["slug"]: Recipe.from_dict(cell["recipe"], str(path / "lab.json"))
            for cell in plan["cells"]
        }

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a lab lies there."""
        return (path / "lab.json").is_file()

    @staticmethod
    def check_free(path: Path) -> None:
        """`UserError` when something lies where a lab is to begin."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists and is not a lab", hint="choose another --out")

    @classmethod
    def create(cls, path: Path, plan: LabPlan) -> LabFolder:
        """Begin a lab. `UserError` when something else lies there."""
        cls.check_free(path)
        facts = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "made_by": f"mobilellm {__version__} lab",
            "date": now(),
            "content": plain(plan.lab.content()),
            **plan_facts(plan),
        }
        with disk_errors(path):
            for name in ("runs", "claims", "done", "failed"):
                (path / name).mkdir(parents=True, exist_ok=True)
        write_json(path / "lab.json", facts)
        return cls(path, plain(facts))

    @classmethod
    def open(cls, path: Path, lab: LabFile | None = None, seeds: int | None = None) -> LabFolder:
        """Go on with a lab. With `lab` it must be that one; more `seeds` are added to it.

        `UserError` for a folder of another lab, fewer seeds, and a finished run that was deleted or
        edited.
        """
        plan = read_json(path / "lab.json")
        if not isinstance(plan, dict) or plan.get("format") != FORMAT:
            raise UserError(f"{path}: not a lab", hint="choose another --out")
        if plan.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{path}: a lab of another version", hint="choose another --out")
        where = str(path / "lab.json")
        plan = checked(plan, LabFacts, where, hint="it is damaged: choose another --out")
        if lab is not None and (differing := differences(plan["content"], plain(lab.content()))):
            raise UserError(
                f"{path}: holds another lab (other {', '.join(differing)})",
                hint="choose another --out, or give the file that began it",
            )
        found = cls(path, plan)
        if seeds is not None and seeds < plan["seeds"]:
            raise UserError(
                f"{path}: began with {plan['seeds']} seeds, not {seeds}",
                hint=f"leave --seeds out, or give {plan['seeds']} or more",
            )
        found.verify()
        if seeds is not None and seeds > plan["seeds"]:
            plan["seeds"] = seeds
            write_json(path / "lab.json", plan)
        return found

    def jobs(self) -> list[Job]:
        """All runs in the order in which they are made: the compared cell with every seed, which
        shows the noise; then seed by seed, so that a lab that ends early has whole rows."""
        cells = self.plan["cells"]
        first = self.plan["content"]["compare"] or cells[0]["name"]
        cells = sorted(cells, key=lambda cell: cell["name"] != first)
        seeds = range(self.plan["seeds"])
        pairs = [(cells[0], seed) for seed in seeds]
        pairs += [(cell, seed) for seed in seeds for cell in cells[1:]]
        return [
            Job(
                cell=cell["name"],
                seed=seed,
                slug=cell["slug"],
                recipe=self.recipes[cell["slug"]].replace("train", seed=seed),
                seconds=cell["seconds"],
            )
            for cell, seed in pairs
        ]

    def run(self, job: Job) -> Path:
        """The run folder of a job."""
        return self.path / "runs" / job.name

    def record(self, kind: str, job: Job) -> Path:
        """Its file in claims, done or failed."""
        return self.path / kind / f"{job.name}.json"

    # --- what is finished ---

    def is_done(self, job: Job) -> bool:
        """Whether its run is finished."""
        return self.record("done", job).is_file()

    def failure(self, job: Job) -> str | None:
        """Why it failed, or None."""
        path = self.record("failed", job)
        return str(read_json(path).get("why", "")) if path.is_file() else None

    def finish(self, job: Job, seconds: float) -> None:
        """Record that a run is finished, and what it left."""
        run = self.run(job)
        files = {name: sha256_file(run / name) for name in KEPT}
        write_json(
            self.record("done", job),
            {"cell": job.cell, "seed": job.seed, "seconds": seconds, "files": files},
        )
        self.record("failed", job).unlink(missing_ok=True)

    def fail(self, job: Job, why: str) -> None:
        """Record that a run failed."""
        write_json(
            self.record("failed", job),
            {"cell": job.cell, "seed": job.seed, "why": why, "when": now()},
        )

    def forget_failures(self) -> None:
        """Let failed runs be tried again."""
        for path in (self.path / "failed").glob("*.json"):
            path.unlink(missing_ok=True)

    def seconds_of(self, job: Job) -> float:
        """What a finished run took."""
        return self.done(job)["seconds"]

    def done(self, job: Job) -> DoneFacts:
        """The record of a finished run. `UserError` for one that is damaged."""
        path = self.record("done", job)
        hint = "remove it to train this run again"
        return checked(read_json(path), DoneFacts, str(path), hint=hint)

    def verify(self) -> None:
        """`UserError` for a finished run that was deleted or edited since, and for one that is not
        finished whose recipe was."""
        for job in self.jobs():
            record = self.record("done", job)
            if not record.is_file():
                if (self.run(job) / "recipe.toml").is_file():
                    check_recipe(self.run(job), job)
                continue
            for name, wanted in self.done(job)["files"].items():
                path = self.run(job) / name
                what = "deleted" if not path.is_file() else "edited"
                if what == "deleted" or sha256_file(path) != wanted:
                    raise UserError(
                        f"{path}: {what} since the lab finished this run",
                        hint=f"restore it, or remove {record} to train it again",
                    )

    # --- who does what ---

    def left(self) -> list[Job]:
        """What is neither done nor failed."""
        return [job for job in self.jobs() if not self.is_done(job) and self.failure(job) is None]

    @contextlib.contextmanager
    def claim(self) -> Iterator[Job | None]:
        """The next run that nobody trains, held for this process while the block runs; None where
        there is none left to take."""
        for job in self.left():
            path = self.record("claims", job)
            if not self._take(path):
                continue
            if self.is_done(job):  # between the two looks
                path.unlink(missing_ok=True)
                continue
            with _beating(path):
                try:
                    yield job
                finally:
                    path.unlink(missing_ok=True)
            return
        yield None

    def _take(self, path: Path) -> bool:
        """Whether this process got the claim."""
        if _create(path):
            return True
        with locked(self.path / ".lock", self.path):
            if not is_stale(path):
                return False
            path.unlink(missing_ok=True)
            return _create(path)


def check_recipe(run: Path, job: Job) -> None:
    """`UserError` for an unfinished run whose recipe is not the lab's any more."""
    own, wanted = read_recipe(run).to_dict(), job.recipe.to_dict()
    changed = sorted(
        f"{section}.{key}"
        for section, values in wanted.items()
        for key in values.keys() | own[section].keys()
        if values.get(key) not in (own[section].get(key), "auto") and section != "start"
    )
    if changed:
        raise UserError(
            f"{run / 'recipe.toml'}: edited since the lab began this run ({', '.join(changed)})",
            hint="restore it, or remove the run's folder to train it again",
        )


def _create(path: Path) -> bool:
    """Make a claim of this process; False where there is one. The operating system lets one
    process create it."""
    with disk_errors(path):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}
            file.write(orjson.dumps(holder))
    return True


def is_stale(path: Path) -> bool:
    """Whether nobody stands behind a claim any more: its process on this machine is gone, or it was
    not renewed for long."""
    try:
        age = time.time() - path.stat().st_mtime
        holder = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return True
    except orjson.JSONDecodeError:  # being written, or cut off by a kill
        return age > STALE_SECONDS
    if isinstance(holder, dict) and holder.get("host") == socket.gethostname():
        return not _alive(holder.get("pid"))
    return age > STALE_SECONDS


def _alive(pid: Any) -> bool:
    """Whether a process of this machine runs."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Renew a claim's time while the block runs."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="mobilellm-claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def plain(values: Any) -> Any:
    """Values as JSON gives them back."""
    return orjson.loads(orjson.dumps(values))


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys whose values differ."""
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
