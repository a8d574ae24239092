"""Tasks done by processes, and kept: a finished task is never done again, however the run ended.

    with Workspace.open(out) as work:                     # the folder OUT.preparing, locked
        results = work.run("mobilellm.words:count_words", job, [KeyedTask(key, {...})], workers=8)

Each finished task is a folder under OUT.preparing/tasks, complete under its name or not there.
Workers are `python -m mobilellm.jobs.worker` and are spoken to in JSON lines; they end when their
standard input does, so that none outlives a run that is killed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import orjson

from mobilellm.errors import UserError
from mobilellm.files import check_absent, disk_errors, locked, read_json, sweep_partial
from mobilellm.jobs.task import KeyedTask, Progress, TaskError, Values, resolve, run_task
from mobilellm.jobs.worker import message_of

ONE_THREAD_TOKENIZERS = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "FASTOKENS_BPE_THREADS": "1",  # its helpers wait for one another by spinning
}
"""Environment in which no library of tokenizers has threads of its own."""
ONE_THREAD = ONE_THREAD_TOKENIZERS | {"OMP_NUM_THREADS": "1"}
"""Environment of a worker: the processes are the parallelism."""

Answer = tuple[int, Values | None]
"""Number of the worker, and what it answered; none when it ended."""


def no_progress(done: float) -> None:
    """Listens to a run's progress and does nothing."""


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
        """Lock the folder beside `out`.

        It is removed when the block ends well, or when nothing in it is worth keeping. `UserError`
        when `out` exists, or another process is at work on it.
        """
        check_absent(out)
        work = cls(out)
        hint = "wait for it, or choose another name"
        with disk_errors(out), locked(work.path / "lock", out, "is preparing it", hint=hint):
            work.tasks.mkdir(exist_ok=True)
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

    def start(self, count: int, preload: Sequence[str] = ()) -> None:
        """Start `count` workers, which import the modules `preload` while the caller goes on."""
        command = [sys.executable, "-m", "mobilellm.jobs.worker", *preload]
        for _ in range(count):
            self._started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | ONE_THREAD,
                )
            )

    def warm(self, function: str, *arguments: Any) -> None:
        """Let the workers that `start` has started call a function of this package now, for what
        it keeps (a cache). What it raises is left to the task that needs it."""
        message = {"warm": function, "arguments": arguments}
        for worker in self._started:
            assert worker.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
                worker.stdin.flush()

    def finished(self, key: str) -> Values | None:
        """The result of a task that is done."""
        path = self.tasks / key / "result.json"
        with contextlib.suppress(UserError):
            found = read_json(path)
            if isinstance(found, dict):
                return found
        # Done in part, or damaged since: it is done again.
        shutil.rmtree(self.tasks / key, ignore_errors=True)
        return None

    def run(
        self,
        function: str,
        job: Values,
        tasks: Sequence[KeyedTask],
        *,
        workers: int = 1,
        progress: Progress = no_progress,
        preload: Sequence[str] = (),
    ) -> list[Values]:
        """Do the tasks that are not done; returns the results of all, in the order of `tasks`.

        `function` is "module:name" within this package (see `mobilellm.jobs.task`); `job` is what
        all tasks have in common. `progress` is called with the weight done so far. Workers beyond
        those that `start` has started import `preload` first.

        Raises `UserError` and `TaskError` as the tasks raise them, and `UserError` when a worker
        dies; the other tasks that are running then are not waited for.
        """
        results: dict[str, Values] = {}
        missing: list[KeyedTask] = []
        done = 0.0
        for task in tasks:
            found = self.finished(task.key)
            if found is None:
                missing.append(task)
            else:
                results[task.key] = found
                done += task.weight
        if done:
            progress(done)
        if workers <= 1 or len(missing) <= 1:
            for task in missing:
                results[task.key] = run_task(
                    function, job, task, self.tasks, _offset(progress, done)
                )
                done += task.weight
                progress(done)
        else:
            # The largest first, so that none is left alone at the end.
            missing.sort(key=lambda task: -task.weight)
            count = min(workers, len(missing))
            self.start(count - len(self._started), preload)
            team, self._started = self._started[:count], self._started[count:]
            results |= _Crew(team, function, job, self.tasks).run(missing, done, progress)
        return [results[task.key] for task in tasks]


class _Crew:
    """Workers among which the tasks of one run are spread."""

    def __init__(
        self, workers: list[subprocess.Popen[bytes]], function: str, job: Values, folder: Path
    ) -> None:
        self.workers, self.function, self.job, self.folder = workers, function, job, folder
        self.at: dict[int, KeyedTask] = {}  # number of a worker -> its task

    def run(self, tasks: Sequence[KeyedTask], done: float, progress: Progress) -> dict[str, Values]:
        """Results by key. `done` is the weight of what was finished before."""
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        for number, worker in enumerate(self.workers):
            assert worker.stdout is not None
            threading.Thread(
                target=_listen, args=(number, worker.stdout, answers), daemon=True
            ).start()
        results: dict[str, Values] = {}
        waiting = iter(tasks)
        parts = [0.0] * len(self.workers)
        try:
            for number in range(len(self.workers)):
                self._give(number, next(waiting, None))
            while self.at:
                number, answer = answers.get()
                if answer is None:
                    self._ended(number)
                elif "progress" in answer:
                    parts[number] = answer["progress"]
                    progress(done + sum(parts))
                elif "result" in answer:
                    task = self.at.pop(number)
                    results[task.key] = answer["result"]
                    done, parts[number] = done + task.weight, 0.0
                    self._give(number, next(waiting, None))
                    progress(done + sum(parts))
                else:
                    raise _error_of(answer)
        finally:
            for worker in self.workers:
                with contextlib.suppress(OSError):
                    worker.stdin.close()  # type: ignore[union-attr]
                if self.at:
                    worker.kill()
            for worker in self.workers:
                worker.wait()
        return results

    def _give(self, number: int, task: KeyedTask | None) -> None:
        if task is None:
            return
        self.at[number] = task
        stream = self.workers[number].stdin
        assert stream is not None
        message = message_of(self.function, self.job, task, self.folder)
        with contextlib.suppress(BrokenPipeError):  # it ended, which its closed output tells
            stream.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
            stream.flush()

    def _ended(self, number: int) -> None:
        """`UserError` when the worker had a task."""
        if number in self.at:
            status = self.workers[number].wait()
            raise UserError(
                f"a worker process ended (status {status}) in the middle of its task",
                hint="was memory short? Run again, with fewer --workers: what is finished is kept",
            )


def _offset(progress: Progress, done: float) -> Progress:
    return lambda part: progress(done + part)


def _error_of(answer: Values) -> Exception:
    """The exception that a worker reports."""
    if "error" in answer:
        kind = resolve(answer["error"])
        if isinstance(kind, type) and issubclass(kind, TaskError):
            return kind(answer["text"])
    if "what" in answer:
        return UserError(answer["what"], hint=answer["hint"])
    return RuntimeError(f"a worker failed:\n{answer.get('bug', answer)}")


def _listen(number: int, stream: IO[bytes], answers: queue.SimpleQueue[Answer]) -> None:
    for line in stream:
        answers.put((number, orjson.loads(line)))
    answers.put((number, None))
