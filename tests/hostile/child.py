"""A process that tries cases: one JSON line in for each, one out before it and one after.

    python -m tests.hostile.child BASE        {"format": "GGUF", "seed": 7} -> {"seed": 7, ...}

A case runs the command line in this process, with standard output and error in a file, under a
limit of address space and an alarm that ends the process. Each line out says what was broken.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MAX_SECONDS = 20
"""Of the processor, so that other work on the machine does not count."""
MAX_WAIT = 240
"""Seconds of the clock, for a case that waits for what never comes."""
MAX_MEMORY = 512 << 20
"""Bytes above what the process held before, beside 1.5 times the input's own."""
ADDRESS_SPACE = 6 << 30
"""Bytes above what the process has mapped after its imports."""


def status(field: str) -> int:
    """Bytes of a field of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def main() -> None:
    from tests.hostile.formats import FORMATS, Case, whole

    from mobilellm import cli
    from mobilellm.damage import NET
    from mobilellm.printable import CONTROL

    base = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    captured = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
    for descriptor, file in enumerate(captured, 1):
        os.dup2(file.fileno(), descriptor)

    def said() -> list[str]:
        """What was written to standard output and error since the last call."""
        found = []
        for stream, file in zip((sys.stdout, sys.stderr), captured, strict=True):
            stream.flush()
            file.seek(0)
            found.append(file.read().decode("utf-8", "surrogateescape"))
            file.seek(0)
            file.truncate()
        return found

    def run(arguments: list[str]) -> int:
        if arguments[0] == "read":
            return read(arguments[1], Path(arguments[2]))
        try:
            with open(base / "line.txt") as sys.stdin:
                cli.main(arguments)
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    def attempt(name: str, seed: int) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="mobilellm-hostile-"))
        case = Case(random.Random(f"{name}:{seed}"), base, folder)
        problems: list[str] = []
        code, out, err = 0, "", ""
        try:
            commands = whole(case, seed) if name == "whole" else FORMATS[name][0](case)
            said()  # what making it wrote
            size = sum(path.lstat().st_size for path in folder.rglob("*"))
            Path("/proc/self/clear_refs").write_text("5")
            before, begun = status("VmRSS"), time.process_time()
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS + 5)  # of the processor
            signal.alarm(MAX_WAIT)
            for command in commands:
                try:
                    code = run(command)
                except BaseException:
                    problems.append("traceback: " + traceback.format_exc()[-1500:])
                out, err = said()
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds, peak = time.process_time() - begun, status("VmHWM") - before
            # A run that goes on says a line of each checkpoint that it passes over.
            progress = ("mobilellm: note: ", "rejected: ")
            complaints = [line for line in err.splitlines() if not line.startswith(progress)]
            if code not in (0, 2):
                problems.append(f"exit status {code}")
            if "Traceback" in err or "panicked" in err:
                problems.append("a traceback or a panic was printed")
            # What a model writes goes into a file as it is.
            shown = err if commands[-1][0] == "generate" else out + err
            if CONTROL.search(shown):
                problems.append(f"unprintable text: {shown[:300]!r}")
            one_line = len(complaints) == 1 and complaints[0].startswith("mobilellm: ")
            if code == 2 and not one_line and "--validate" not in commands[-1]:
                problems.append(f"{len(complaints)} lines for one fault: {err[:1500]!r}")
            if code == 2 and case.out.exists():
                problems.append("a result under its final name")
            if seconds > MAX_SECONDS:
                problems.append(f"{seconds:.0f} s")
            if peak > MAX_MEMORY + 1.5 * size:
                problems.append(f"{peak >> 20} MiB held for an input of {size} bytes")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {
            "format": name, "seed": seed, "status": code, "net": NET in err, "text": err[:300],
            "seconds": round(seconds, 3), "peak": peak, "command": commands[-1],
            "problems": problems,
        }  # fmt: skip

    (base / "line.txt").write_text("hello\n")
    run(["generate", str(base / "hf"), "--prompt", "a", "--max-new-tokens", "1"])  # the imports
    said()
    limit = status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.__stdin__:
        asked = json.loads(line)
        print(json.dumps({"begin": asked}), file=answers, flush=True)
        try:
            answer = attempt(asked["format"], asked["seed"])
        except Exception:  # in the making of the case
            answer = asked | {"problems": ["no case: " + traceback.format_exc()[-1500:]]}
            answer |= {
                "status": -1,
                "net": False,
                "seconds": 0.0,
                "peak": 0,
                "text": "",
                "command": [],
            }
        print(json.dumps(answer), file=answers, flush=True)


def read(kind: str, path: Path) -> int:
    """A reader behind no verb of its own, with the command line's edge around it."""
    from mobilellm.damage import as_user_error
    from mobilellm.lab.lab_file import read_lab
    from mobilellm.printable import one_line
    from mobilellm.profiling.device_profile import read_profile
    from mobilellm.train import checkpoint

    try:
        if kind == "profile":
            read_profile(path)
        elif kind == "lab":
            read_lab(str(path))
        else:
            checkpoint.verify(path)
            checkpoint.read_state(path)
    except Exception as error:
        complaint = as_user_error(error)
        if complaint is None:
            raise
        print(f"mobilellm: {one_line(str(complaint))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    main()
