"""From the command to the first line and the first step: `mobilellm train` at 1M.

    python benchmarks/start_up.py --save benchmarks/results/start_up.json

Each case is the command itself, in a process of its own, stopped behind its third step; seconds are
from its start. "empty" has no cache yet (folders of its own stand for the user's cache and for the
temporary files), "kept" is the same command again, with other temporary files, as after a restart.
The processor time is that of the command and its compilers until the third step, and depends least
on what else the machine does. The imports are of a process that only imports what the command
needs. Cases take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer_vs_hf import set_up

IMPORTS = "import mobilellm.cli.train, mobilellm.terminal.live_view, mobilellm.train.start"
FIGURES = ("first_line", "first_step", "second_step", "third_step")


def command(folder: Path, out: Path, compile_: str) -> list[str]:
    """`mobilellm train` at 1M, showing every step."""
    settings = {
        "model.preset": "1M",
        "data.path": folder / "data",
        "data.sequence-length": 256,
        "train.steps": 1000,
        "train.batch-tokens": 2048,
        "train.evaluate-every": 0,
        "train.log-every": 1,
        "train.compile": compile_,
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "mobilellm", "train", *flags, "--out", str(out)]


def timed(arguments: list[str], cache: Path) -> dict[str, float]:
    """Seconds from the start of the command to its first line and its first steps."""
    temporary = tempfile.mkdtemp(dir=cache)
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": temporary}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    start, found = time.perf_counter(), {}
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        passed = time.perf_counter() - start
        found.setdefault("first_line", passed)
        for number, name in enumerate(FIGURES[1:], 1):
            if line.startswith(f"step {number:>6} "):
                found[name] = passed
        if "third_step" in found:
            break
    os.killpg(process.pid, signal.SIGKILL)
    used = os.wait4(process.pid, 0)[2]
    process.returncode = -signal.SIGKILL
    found["processor_time"] = used.ru_utime + used.ru_stime
    if "third_step" not in found:
        raise SystemExit("".join(lines))
    return found


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each case."""
    taken: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        folder = Path(name)
        set_up(folder, "smoke")
        for number in range(rounds):
            for case, compile_ in (
                ("not compiled", "off"),
                ("compiled, cache empty", "auto"),
                ("compiled, cache kept", "auto"),
            ):
                cache = folder / f"cache-{number}-{compile_}"
                cache.mkdir(exist_ok=True)
                out = folder / f"run-{number}-{case.replace(' ', '-')}"
                taken.setdefault(case, []).append(timed(command(folder, out, compile_), cache))
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", IMPORTS], check=True)
            taken.setdefault("imports", []).append({"seconds": time.perf_counter() - start})
    return {
        case: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for case, runs in taken.items()
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    import torch

    from mobilellm.hardware.description import describe

    machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}")
    found = measure(arguments.rounds)
    for case, figures in found.items():
        about = ", ".join(
            f"{key.replace('_', ' ')} {value:.2f} s" for key, value in figures.items()
        )
        print(f"{case}: {about}")
    if arguments.save:
        record: dict[str, Any] = {
            "benchmark": "start_up",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "rounds": arguments.rounds,
            "cases": found,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
