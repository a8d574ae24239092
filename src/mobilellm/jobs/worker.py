"""A process that does tasks: it reads one JSON line a task, and answers in JSON lines.

    python -m mobilellm.jobs.worker MODULE ...      started by `mobilellm.jobs.pool`, not by hand

The modules named on its command line are imported at once, while the first task is still being
planned. It ends with its standard input, also in the middle of a task. What a task prints goes to
standard error, so that it cannot be taken for an answer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import orjson

from mobilellm.damage import as_user_error
from mobilellm.jobs.task import KeyedTask, TaskError, Values, name_of, resolve, run_task
from mobilellm.printable import printable


def message_of(function: str, job: Values, task: KeyedTask, folder: Path) -> dict[str, Any]:
    """What a worker is sent for one task."""
    return {
        "function": function,
        "job": job,
        "key": task.key,
        "task": task.values,
        "folder": str(folder),
    }


def main() -> None:
    """Answer until standard input ends."""
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin.buffer:
            messages.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # a task that needs it will say so
            importlib.import_module(module)

    def answer(**message: Any) -> None:
        out.write(orjson.dumps(message, option=orjson.OPT_APPEND_NEWLINE))
        out.flush()

    while True:
        given = orjson.loads(messages.get())
        if "warm" in given:
            with contextlib.suppress(Exception):  # a task that needs it will say so
                resolve(given["warm"])(*given["arguments"])
            continue
        task = KeyedTask(given["key"], given["task"])
        try:
            result = run_task(
                given["function"],
                given["job"],
                task,
                Path(given["folder"]),
                lambda done: answer(progress=done),
            )
            answer(result=result)
        except TaskError as error:
            answer(error=name_of(type(error)), text=str(error))
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException as error:
            complaint = as_user_error(error)
            if complaint is None:
                answer(bug=traceback.format_exc())
            else:
                answer(what=printable(complaint.what), hint=printable(complaint.hint))


if __name__ == "__main__":
    main()
