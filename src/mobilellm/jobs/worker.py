"""A process that does tasks: reads one JSON line a task, answers in JSON lines, ends with its standard input.

python -m mobilellm.jobs.worker      started by `mobilellm.jobs.pool`, not by hand
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from mobilellm.errors import UserError
from mobilellm.files import PARTIAL, disk_errors, sync, write_json


def do(
    kind: str, job: dict[str, Any], task: dict[str, Any], key: str, folder: Path, progress: Callable[[float], None]
) -> dict[str, Any]:  # fmt: skip
    """Do one task of any kind: its files and its result appear as `folder/key` all at once, or not at all."""
    with disk_errors(folder):
        staging = Path(tempfile.mkdtemp(prefix=f".{key}{PARTIAL}", dir=folder))
        try:
            result = _perform(kind, job, task, staging, progress)
            write_json(staging / "result.json", result)
            for inside, _, names in os.walk(staging):
                for name in names:
                    sync(Path(inside, name))
                sync(Path(inside))
            os.rename(staging, folder / key)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return result


def _perform(
    kind: str,
    job: dict[str, Any],
    task: dict[str, Any],
    staging: Path,
    progress: Callable[[float], None],
) -> dict[str, Any]:
    if kind == "tokenize":
        from mobilellm.prepare.tasks import Job, Task, run_task

        return asdict(run_task(Task.from_dict(task), Job.from_dict(job), staging, progress))
    if kind == "samples":
        from mobilellm.prepare.samples import write_samples

        return write_samples(task, job, staging)
    if kind == "index":
        from mobilellm.data.dataset import index_file

        return index_file(task, job, staging)
    if kind == "check":
        from mobilellm.data.validate import check_samples, check_shard

        path = Path(task["file"])
        return (
            check_samples(path, job)
            if task["check"] == "samples"
            else check_shard(path, task["shard"], job)
        )
    raise ValueError(f"no task of kind {kind!r}")


def main() -> None:
    """Answer until standard input ends, and then end at once, also in the middle of a task."""
    from mobilellm.tokenizer.encoder import MismatchError

    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            tasks.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(ImportError):
        import fastokens  # noqa: F401
        import tokenizers  # noqa: F401  (what most tasks need, loaded while the first is still being planned)

        import mobilellm.prepare.tasks  # noqa: F401
    out = sys.stdout.buffer

    def answer(**message: Any) -> None:
        out.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
        out.flush()

    while True:
        given = orjson.loads(tasks.get())
        try:
            folder = Path(given["folder"])
            result = do(
                given["kind"],
                given["job"],
                given["task"],
                given["key"],
                folder,
                lambda done: answer(progress=done),
            )
            answer(result=result)
        except MismatchError as error:
            answer(mismatch=str(error))
        except UserError as error:
            answer(what=error.what, hint=error.hint)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            answer(bug=traceback.format_exc())


if __name__ == "__main__":
    main()
