"""Tasks run by processes, and kept: what is finished is never done again, however the run ended.

    with Workspace.open(out) as work:                     # the folder OUT.preparing, locked
        results = work.run("tokenize", job, [(key, task), ...], workers=8)

Each finished task is a folder under OUT.preparing/tasks, complete under its name or not there. Workers are
`python -m mobilellm.jobs.worker` and are spoken to in JSON lines; they end when their standard input does, so that none
outlives a run that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from mobilellm.errors import UserError
from mobilellm.files import disk_errors, read_json, sweep_partial
from mobilellm.jobs.worker import do
from mobilellm.tokenizer.encoder import MismatchError

Keyed = tuple[str, dict[str, Any]]
Progress = Callable[[float], None]


class Workspace:
    """The folder in which a result is made."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f"{out.name}.preparing")
        self.tasks = self.path / "tasks"
        self._started: list[subprocess.Popen[bytes]] = []

    @classmethod
    @contextlib.contextmanager
    def open(cls, out: Path) -> Iterator[Workspace]:
        """Lock the folder beside `out`. It is removed when the block ends well, or when nothing in it is worth keeping.

        `UserError` when `out` exists, or another process is at work on it.
        """
        if out.exists():
            raise UserError(f"{out}: exists already", hint="choose another name or remove it")
        work = cls(out)
        with disk_errors(out):
            work.tasks.mkdir(parents=True, exist_ok=True)
            lock = open(work.path / "lock", "a+")  # noqa: SIM115  (held until the end)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (
                    work.path / "lock"
                ).exists():  # the other one finished between the two lines above
                    raise BlockingIOError
            except OSError:
                lock.seek(0)
                by = lock.read().strip()
                lock.close()
                raise UserError(
                    f"{out}: another process{f' ({by})' if by else ''} is preparing it",
                    hint="wait for it, or choose another name",
                ) from None
            lock.truncate(0)
            lock.write(f"process {os.getpid()}\n")
            lock.flush()
            try:
                sweep_partial(work.tasks)
                yield work
            except BaseException:
                if not any(work.tasks.iterdir()):
                    shutil.rmtree(work.path, ignore_errors=True)
                raise
            else:
                shutil.rmtree(work.path)
            finally:
                for worker in work._started:  # for which there was nothing to do
                    worker.kill()
                    worker.communicate()
                lock.close()

    def start(self, count: int) -> None:
        """Start so many workers, which load what they will need while this process still prepares."""
        environment = os.environ | {
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        for _ in range(count):
            command = [sys.executable, "-m", "mobilellm.jobs.worker"]
            self._started.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            )

    def finished(self, key: str) -> dict[str, Any] | None:
        """The result of a task that is done."""
        path = self.tasks / key / "result.json"
        return dict(read_json(path)) if path.is_file() else None

    def run(
        self, kind: str, job: dict[str, Any], tasks: Sequence[Keyed], weights: Sequence[float], workers: int, progress: Progress
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Do the tasks that are not done; returns the results of all, in order. `progress` is told the weight done so far.

        `UserError` and `MismatchError` as the tasks raise them; the others that are running then are not waited for.
        """
        results: dict[str, dict[str, Any]] = {}
        missing = []
        done = 0.0
        for (key, task), weight in zip(tasks, weights, strict=True):
            found = self.finished(key)
            if found is None:
                missing.append((weight, key, task))
            else:
                results[key] = found
                done += weight
        if done:
            progress(done)
        if workers <= 1 or len(missing) <= 1:
            for weight, key, task in missing:
                results[key] = do(kind, job, task, key, self.tasks, _offset(progress, done))
                done += weight
                progress(done)
        else:
            # The largest first, so that none is left alone at the end.
            missing.sort(key=lambda one: -one[0])
            results |= self._spread(kind, job, missing, min(workers, len(missing)), done, progress)
        return [results[key] for key, _ in tasks]

    def _spread(
        self, kind: str, job: dict[str, Any], missing: list[tuple[float, str, dict[str, Any]]], count: int, done: float,
        progress: Progress,
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        answers: queue.SimpleQueue[tuple[int, dict[str, Any] | None]] = queue.SimpleQueue()
        self.start(count - len(self._started))
        workers, self._started = self._started[:count], self._started[count:]
        readers = [
            threading.Thread(target=_listen, args=(i, w.stdout, answers), daemon=True)
            for i, w in enumerate(workers)
        ]
        for reader in readers:
            reader.start()
        results: dict[str, dict[str, Any]] = {}
        waiting = iter(missing)
        at: dict[int, tuple[float, str]] = {}
        parts = [0.0] * count

        def give(i: int) -> None:
            following = next(waiting, None)
            if following is not None:
                weight, key, task = following
                at[i] = weight, key
                _say(
                    workers[i],
                    {"kind": kind, "job": job, "task": task, "key": key, "folder": str(self.tasks)},
                )

        try:
            for i in range(count):
                give(i)
            while at:
                i, answer = answers.get()
                if answer is None:
                    if i in at:
                        raise UserError(
                            f"a worker process ended (status {workers[i].wait()}) in the middle of its task",
                            hint="was memory short? Run again, with fewer --workers: what is finished is kept",
                        )
                    continue
                if "progress" in answer:
                    parts[i] = answer["progress"]
                elif "result" in answer:
                    weight, key = at.pop(i)
                    results[key] = answer["result"]
                    done, parts[i] = done + weight, 0.0
                    give(i)
                elif "mismatch" in answer:
                    raise MismatchError(answer["mismatch"])
                elif "what" in answer:
                    raise UserError(answer["what"], hint=answer["hint"])
                else:
                    raise RuntimeError(f"a worker failed:\n{answer['bug']}")
                progress(done + sum(parts))
        finally:
            for worker in workers:
                with contextlib.suppress(OSError):
                    worker.stdin.close()  # type: ignore[union-attr]
                if at:
                    worker.kill()
            for worker in workers:
                worker.wait()
        return results


def _offset(progress: Progress, done: float) -> Progress:
    return lambda part: progress(done + part)


def _say(worker: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it ended: its closed output is what tells
        worker.stdin.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
        worker.stdin.flush()


def _listen(
    i: int, stream: IO[bytes], answers: queue.SimpleQueue[tuple[int, dict[str, Any] | None]]
) -> None:
    for line in stream:
        answers.put((i, orjson.loads(line)))
    answers.put((i, None))
