"""How fast files run on this machine: load, first token, tokens a second, memory, in turns.

    found = profile([Path("m.gguf"), Path("runs/demo")], prompt=512, generate=128, repeats=5)
    found["rows"][0]["figures"]["load_ms"]["median"]

Every repeat of every file is a process of its own (`profile_child`), and all take turns, so that
what else the machine does meets each alike. The bandwidth of memory is measured in the same turns.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mobilellm.errors import UserError, unknown_name
from mobilellm.files import sha256_file
from mobilellm.hardware.bandwidth import ARRAY_BYTES, cache_bytes
from mobilellm.hardware.description import describe
from mobilellm.hardware.device_memory import total_memory
from mobilellm.interop.load import recognize
from mobilellm.profiling.bytes_read import bytes_per_token, config_of, model_facts, weights_in
from mobilellm.profiling.device_profile import (
    FORMAT,
    FORMAT_VERSION,
    DeviceProfile,
    ProfileRow,
    bound,
    figure,
    one_line,
)
from mobilellm.runtimes import ours
from mobilellm.runtimes.session import Runtime
from mobilellm.runtimes.table import RUNTIMES, runtimes_of
from mobilellm.version import __version__

PROBE_SECONDS = 0.3
"""Of each way in which the bandwidth of memory is measured, in each turn."""


@dataclass
class Contestant:
    """A file in a runtime, and what was measured of it so far."""

    name: str
    file: Path
    runtime: Runtime
    repeats: list[dict[str, float]] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    """Of the last repeat."""
    operators: list[dict[str, Any]] | None = None
    error: str | None = None
    hint: str = ""


def contestants(files: Sequence[Path], runtimes: Sequence[str] = ()) -> list[Contestant]:
    """Each file with the installed runtimes for it, or with those of `runtimes` that are.

    Without `runtimes` our own network runs only what no other installed runtime does. `UserError`
    for files that no runtime knows, and for runtimes that are unknown, not installed, or for none
    of the files.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise unknown_name("runtime", name, RUNTIMES)
        RUNTIMES[name].require()
    found: list[Contestant] = []
    for label, file in zip(labels(files), files, strict=True):
        fitting = runtimes_of(file)
        if runtimes:
            chosen = [runtime for runtime in fitting if runtime.name in runtimes]
            if not chosen:
                names = ", ".join(runtime.name for runtime in fitting)
                raise UserError(
                    f"{file}: {', '.join(runtimes)} does not run it", hint=f"use {names}"
                )
        else:
            installed = [runtime for runtime in fitting if runtime.installed]
            chosen = [runtime for runtime in installed if runtime is not ours.RUNTIME] or installed
            if not chosen:
                fitting[0].require()
        found += [Contestant(label, file, runtime) for runtime in chosen]
    return found


def labels(files: Sequence[Path]) -> list[str]:
    """A short name for each file: the last part of its path, or all of it where that is not unique.
    `UserError` for a file that is given twice."""
    names = [file.resolve().name for file in files]
    found = [
        name if names.count(name) == 1 else str(file)
        for name, file in zip(names, files, strict=True)
    ]
    if len(set(found)) < len(found):
        raise UserError("the same file is given twice", hint="give it once")
    return found


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def profile(
    files: Sequence[Path],
    *,
    prompt: int = 512,
    generate: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    runtimes: Sequence[str] = (),
    operators: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> DeviceProfile:
    """Measure `files` with a prompt of `prompt` tokens and `generate` tokens written after it.

    `runtimes` are names of RUNTIMES; `operators` adds where the time goes. A file that fails is a
    row that says why, and the others go on. After Ctrl-C the profile has what was finished.
    `UserError` for what can be seen before anything is measured, and when all files are refused.
    """
    for name, value in (("prompt", prompt), ("generate", generate), ("repeats", repeats)):
        if value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    if threads is not None and threads < 1:
        raise UserError(f"threads {threads}: must be 1 or more")
    found, cores = contestants(files, runtimes), threads or default_threads()
    probes: list[dict[str, float]] = []
    total, done, interrupted = repeats * (len(found) + 1) + operators * len(found), 0, False
    probe = {"kind": "bandwidth", "seconds": PROBE_SECONDS, "array_bytes": ARRAY_BYTES}
    settings = {"prompt": prompt, "generate": generate}
    try:
        for _ in range(repeats):
            answer = ask(probe, cores)
            if "figures" in answer:
                probes.append(answer["figures"])
            progress(done := done + 1, total)
            for one in found:
                take_turn(one, {"kind": "speed"} | settings, cores, say)
                progress(done := done + 1, total)
        for one in found if operators else ():
            take_turn(one, {"kind": "operators"} | settings, cores, say)
            progress(done := done + 1, total)
    except KeyboardInterrupt:
        interrupted = True
    if all(one.error is not None and one.answer.get("user") for one in found):
        raise UserError(f"{found[0].file}: {found[0].error}", hint=found[0].hint)
    made: DeviceProfile = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "made_by": f"mobilellm {__version__} profile",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": settings | {"repeats": repeats, "threads": cores},
        "bandwidth": {
            way: figure([values[way] for values in probes]) for way in (probes[0] if probes else ())
        },
        "interrupted": interrupted,
        "rows": [],
    }
    made["rows"] = [
        row(one, prompt, generate, bound(made)) for one in found if one.repeats or one.error
    ]
    return made


def take_turn(
    one: Contestant, request: dict[str, Any], threads: int, say: Callable[[str], None]
) -> None:
    """One repeat of a file, unless it failed before."""
    if one.error is not None:
        return
    what = {"file": str(one.file), "runtime": one.runtime.name}
    one.answer = ask(request | what, threads)
    if "error" in one.answer:
        said = str(one.answer["error"]).removeprefix(f"{one.file}: ")
        if request["kind"] == "operators":  # the speeds stand
            say(f"{one.name} in {one.runtime.name}: no operators: {said}")
            return
        one.error, one.hint = said, str(one.answer.get("hint", ""))
        say(f"{one.name} in {one.runtime.name}: failed: {said}")
    elif request["kind"] == "operators":
        one.operators = one.answer["operators"]
    else:
        one.repeats.append(one.answer["figures"])


def ask(request: dict[str, Any], threads: int) -> dict[str, Any]:
    """The answer of a new process to a request; an `error` with the process's last words where it
    died."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "mobilellm.profiling.child"]
    command += [json.dumps(request | {"threads": threads}), str(writing)]
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    with os.fdopen(reading, "rb") as result, tempfile.TemporaryFile() as words:
        try:
            # In a session of its own, so that Ctrl-C reaches this process alone.
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=words,
                pass_fds=(writing,),
                start_new_session=True,
                env=environment,
            )
        finally:
            os.close(writing)
        try:
            text = result.read()
            process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            if process.stdin is not None:
                process.stdin.close()
        words.seek(0)
        lines = words.read().decode(errors="replace").strip().splitlines()
    try:
        found = json.loads(text)
    except ValueError:
        return {"error": last_words(process.returncode, lines), "hint": "", "user": False}
    return found if isinstance(found, dict) else {"error": "no answer", "user": False}


def last_words(status: int, lines: Sequence[str]) -> str:
    """How a process ended, and the last line that it printed."""
    said = f": {one_line(lines[-1])}" if lines else ""
    if status >= 0:
        return f"its process ended with status {status}{said}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{why}{said}"


def row(one: Contestant, prompt: int, generate: int, bandwidth: float | None) -> ProfileRow:
    """What is written of a file."""
    try:
        run = one.runtime.file_of(one.file)
    except UserError:  # of a row that has its error already
        run = one.file
    size, digest = content(run)
    config = config_of(one.file)
    figures = {
        key: figure([repeat[key] for repeat in one.repeats])
        for key in (one.repeats[0] if one.repeats and one.error is None else ())
    }
    needed = share = None
    if figures:
        weights = one.answer.get("weight_bytes") or weights_in(run)
        number = one.answer.get("cache_number_bytes")
        needed = bytes_per_token(weights, config, one.runtime.name, number, prompt + generate / 2)
        if needed is not None and bandwidth:
            share = needed * figures["decode_tokens_per_second"]["median"] / bandwidth
    return {
        "name": one.name,
        "file": str(one.file),
        "runtime": one.runtime.name,
        "runtime_version": version_of(one.runtime.package),
        "bytes": size,
        "sha256": digest,
        "model": None if config is None else model_facts(config),
        "figures": figures,
        "bytes_per_token": needed,
        "bandwidth_share": share,
        "operators": one.operators,
        "error": one.error,
    }


def content(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; of a folder those of its files, without a run's training
    state."""
    if not path.is_dir():
        return path.stat().st_size, sha256_file(path)
    size, digest = 0, hashlib.sha256()
    for file in sorted(p for p in model_folder(path).rglob("*") if p.is_file()):
        if "train_state" not in file.parts:
            size += file.stat().st_size
            digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return size, digest.hexdigest()


def model_folder(path: Path) -> Path:
    """The folder of the model: of a run that is its newest checkpoint."""
    try:
        return recognize(path)[1]
    except UserError:
        return path


@functools.cache
def version_of(package: str) -> str | None:
    """Version of an installed package, by the name that is imported."""
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures are of."""
    cpu = torch.device("cpu")
    kept = ("mobilellm", "python", "torch", "platform", "device", "cpu_capability", "commit")
    facts = describe(cpu)
    return {key: facts[key] for key in kept} | {
        "processors": default_threads(),
        "memory_bytes": total_memory(cpu),
        "cache_bytes": cache_bytes(),
    }
