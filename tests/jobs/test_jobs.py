"""Tasks as processes: order, failures, a killed run that goes on, a worker that dies."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mobilellm
from mobilellm.errors import UserError
from mobilellm.jobs import pool, worker
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask, TaskError, name_of, resolve, run_task

HERE = Path(__file__).parent
SQUARE, FAIL = "mobilellm.toy_tasks:square", "mobilellm.toy_tasks:fail"
PRELOAD = ("in_package",)

SCRIPT = """
import sys
from pathlib import Path
import in_package
from mobilellm.jobs.pool import Workspace
from mobilellm.jobs.task import KeyedTask
tasks = [KeyedTask(f"k{i}", {"number": i, "sleep": 0.1}) for i in range(12)]
with Workspace.open(Path("out")) as work:
    found = work.run("mobilellm.toy_tasks:square", {"log": "log.txt"}, tasks, workers=2,
                     preload=("in_package",))
    print([result["square"] for result in found])
"""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `mobilellm.toy_tasks` importable here and in the processes that are started."""
    monkeypatch.setattr(mobilellm, "__path__", [*mobilellm.__path__, str(HERE)])
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace.open(tmp_path / "out") as opened:
        yield opened


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return {"log": str(tmp_path / "log.txt")}


def numbers(job: dict[str, Any]) -> list[int]:
    """Numbers of the tasks that were begun, in order."""
    return [int(line.split()[0]) for line in Path(job["log"]).read_text().splitlines()]


def keyed(count: int, **values: Any) -> list[KeyedTask]:
    return [KeyedTask(f"k{i}", {"number": i, **values}) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(
    work: Workspace, job: dict[str, Any], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def message_of(function: str, job: dict[str, Any], task: KeyedTask, folder: Path) -> Any:
        given.append(task.key)
        return worker.message_of(function, job, task, folder)

    monkeypatch.setattr(pool, "message_of", message_of)
    tasks = [
        KeyedTask(f"k{i}", {"number": i, "sleep": 0.05 * (i % 2)}, weight)
        for i, weight in enumerate((1, 4, 2, 8, 3))
    ]
    found = work.run(SQUARE, job, tasks, workers=workers, preload=PRELOAD)
    assert [result["square"] for result in found] == [0, 1, 4, 9, 16]
    assert [(work.tasks / f"k{i}/square.txt").read_text() for i in range(3)] == ["0", "1", "4"]
    if workers == 1:
        assert numbers(job) == [0, 1, 2, 3, 4]
    else:  # the heaviest first; which process writes its line first is another matter
        assert given == ["k3", "k1", "k4", "k2", "k0"]
        assert sorted(numbers(job)) == [0, 1, 2, 3, 4]


def test_the_tasks_are_spread_over_processes(work: Workspace, job: dict[str, Any]) -> None:
    work.run(SQUARE, job, keyed(6, sleep=0.2), workers=3, preload=PRELOAD)
    processes = {line.split()[1] for line in Path(job["log"]).read_text().splitlines()}
    assert len(processes) == 3
    assert str(os.getpid()) not in processes


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_never_goes_back_and_ends_at_the_whole(
    work: Workspace, job: dict[str, Any], workers: int
) -> None:
    work.run(SQUARE, job, [KeyedTask("k0", {"number": 0}, 2.0)])
    tasks = [KeyedTask(f"k{i}", {"number": i, "done": 1.5}, 2.0) for i in range(4)]
    seen: list[float] = []
    work.run(SQUARE, job, tasks, workers=workers, progress=seen.append, preload=PRELOAD)
    assert seen == sorted(seen)
    assert seen[0] == 2.0  # of the task that was done before
    assert any(done % 2 for done in seen)  # parts of tasks are told, too
    assert seen[-1] == 8.0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("user", UserError, r"^toy\.txt:7: broken; mend line 7$"),
        ("toy", TaskError, "^two ids differ$"),
    ],
)
def test_a_failure_is_raised_where_the_task_was_given_out(
    work: Workspace, job: dict[str, Any], how: str, kind: type[Exception], text: str, workers: int
) -> None:
    """A user's error keeps its hint, and an error of the task's own kind keeps its class."""
    tasks = [
        KeyedTask("bad", {"how": how, "number": 1}, 9.0),
        KeyedTask("slow", {"number": 2, "sleep": 30.0}, 8.0),
    ]
    start = time.monotonic()
    with pytest.raises(kind, match=text) as caught:
        work.run(FAIL, job, tasks, workers=workers, preload=PRELOAD)
    assert time.monotonic() - start < 20  # the other task was not waited for
    if how == "user":
        assert caught.value.hint == "mend line 7"  # type: ignore[attr-defined]
    else:
        assert name_of(type(caught.value)) == "mobilellm.toy_tasks:ToyError"
    assert not [path for path in work.tasks.iterdir() if path.name[0] != "."]
    if workers == 1:
        assert not list(work.tasks.iterdir())  # not even a part


def test_a_bug_in_a_task_keeps_its_traceback(work: Workspace, job: dict[str, Any]) -> None:
    tasks = [KeyedTask(f"k{i}", {"how": "bug", "number": i}) for i in range(2)]
    with pytest.raises(RuntimeError, match=r"(?s)toy_tasks\.py.*ZeroDivisionError: a bug of the"):
        work.run(FAIL, job, tasks, workers=2, preload=PRELOAD)


def test_a_worker_that_dies_is_one_line_and_what_is_finished_is_kept(
    tmp_path: Path, job: dict[str, Any]
) -> None:
    tasks = [
        *(KeyedTask(f"k{i}", {"number": i}, 9.0) for i in range(3)),
        KeyedTask("bad", {"how": "die", "number": 3}, 1.0),
    ]
    with (
        pytest.raises(UserError, match=r"a worker process ended \(status -9\)") as caught,
        Workspace.open(tmp_path / "out") as work,
    ):
        work.run(FAIL, job, tasks, workers=2, preload=PRELOAD)
    assert "\n" not in str(caught.value)
    assert "fewer --workers" in caught.value.hint
    before = numbers(job)
    tasks[-1] = KeyedTask("bad", {"number": 3})
    with Workspace.open(tmp_path / "out") as work:
        found = work.run(FAIL, job, tasks, workers=2, preload=PRELOAD)
    assert [result["square"] for result in found] == [0, 1, 4, 9]
    again = numbers(job)[len(before) :]
    assert 3 in again
    assert len(again) <= 2  # one worker may have been in the middle of another
    assert not (tmp_path / "out.preparing").exists()


def test_what_a_task_prints_is_not_taken_for_an_answer(
    work: Workspace, job: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    found = work.run(FAIL, job, keyed(2, how="print"), workers=2, preload=PRELOAD)
    assert [result["square"] for result in found] == [0, 1]
    assert "this is no answer" in capfd.readouterr().err


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    tasks, deadline = tmp_path / "out.preparing/tasks", time.monotonic() + 60
    while len(list(tasks.glob("k*/result.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    workers = {int(line.split()[1]) for line in (tmp_path / "log.txt").read_text().splitlines()}
    assert len(workers) == 2
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, workers)), "a worker outlived the run that started it"
    finished = {path.parent.name for path in tasks.glob("k*/result.json")}
    assert 4 <= len(finished) < 12
    (tmp_path / "log.txt").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([i * i for i in range(12)])
    again = {f"k{number}" for number in numbers({"log": tmp_path / "log.txt"})}
    assert again == {f"k{i}" for i in range(12)} - finished


def alive(process: int) -> bool:
    """Whether a process runs: one that ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "mobilellm_other:task",
        "mobilellm.jobs.task",
        "mobilellm.jobs.task:",
        "mobilellm.jobs.task:no_such_thing",
        "mobilellm.jobs.task:os.system",
        "../evil:task",
    ],
)
def test_a_name_that_is_no_task_of_ours_is_refused(
    work: Workspace, job: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        resolve(name)
    with pytest.raises(ValueError, match=re.escape(name)):
        run_task(name, job, KeyedTask("k", {}), work.tasks, lambda done: None)


def test_an_error_that_is_no_task_error_is_not_made_from_its_name() -> None:
    """What a worker sends names a class; only subclasses of `TaskError` are called."""
    from mobilellm.jobs.pool import _error_of

    error = _error_of({"error": "mobilellm.jobs.pool:Workspace", "text": "x"})
    assert isinstance(error, RuntimeError)


def test_a_folder_that_is_there_or_being_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(UserError, match="there: exists already"),
        Workspace.open(tmp_path / "there"),
    ):
        pass
    with Workspace.open(tmp_path / "out"):
        another = f"out: another process \\(process {os.getpid()}\\) is preparing it"
        with pytest.raises(UserError, match=another), Workspace.open(tmp_path / "out"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_workers_that_get_nothing_to_do_are_ended(tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "out") as work:
        work.start(2, PRELOAD)
        started = [worker.pid for worker in work._started]
        assert all(map(alive, started))
    assert not any(map(alive, started))


def test_a_library_that_cannot_be_preloaded_is_left_to_the_task(
    work: Workspace, job: dict[str, Any]
) -> None:
    found = work.run(SQUARE, job, keyed(2), workers=2, preload=("no_such_library", *PRELOAD))
    assert [result["square"] for result in found] == [0, 1]


@pytest.mark.parametrize("name", ["log.txt", "bad"])
def test_workers_are_warm_before_their_first_task(
    work: Workspace, tmp_path: Path, name: str
) -> None:
    """Whatever becomes of it, the tasks are done."""
    log = str(tmp_path / name)
    work.start(2, PRELOAD)
    work.warm("mobilellm.toy_tasks:remember", log)
    found = work.run(SQUARE, {"log": log}, keyed(4, sleep=0.1), workers=2)
    assert [result["square"] for result in found] == [0, 1, 4, 9]
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    first = {process: what for what, process in reversed(lines)}
    assert len(first) == 2
    assert set(first.values()) == {"warm"}
