"""The runtimes, and which of them runs a file.

    for runtime in runtimes_of(Path("model.gguf")):     # those that are for such a file
        print(runtime.name, runtime.installed)
    with open_session(Path("model.gguf"), threads=2) as session:
        logits = session.feed([1, 2, 3])

A new runtime is one entry in RUNTIMES and the file that the entry comes from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mobilellm.errors import UserError, unknown_name
from mobilellm.runtimes import executorch, llama_cpp, onnxruntime, onnxruntime_genai, ours
from mobilellm.runtimes.session import Runtime, Session

OURS = ours.RUNTIME.name
RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        llama_cpp.RUNTIME,
        executorch.RUNTIME,
        onnxruntime.RUNTIME,
        onnxruntime_genai.RUNTIME,
        ours.RUNTIME,
    )
}


def runtimes_of(path: Path) -> list[Runtime]:
    """The runtimes for what lies at `path`, the file's own before ours, installed or not.

    `UserError` when there is nothing at `path`, or nothing that any runtime knows.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    found = [runtime for runtime in RUNTIMES.values() if runtime.recognizes(path)]
    if not found:
        known = "; ".join(f"{runtime.name}: {runtime.what}" for runtime in RUNTIMES.values())
        raise UserError(f"{path}: no runtime knows such a file", hint=known)
    return sorted(found, key=lambda runtime: runtime is ours.RUNTIME)


def runtime_for(path: Path, name: str | None = None) -> Runtime:
    """The runtime called `name`, or the first installed one that is for `path`."""
    found = runtimes_of(path)
    if name is not None:
        if name not in RUNTIMES:
            raise unknown_name("runtime", name, RUNTIMES)
        if RUNTIMES[name] not in found:
            fitting = ", ".join(runtime.name for runtime in found)
            raise UserError(f"{path}: {name} does not run such a file", hint=f"use {fitting}")
        RUNTIMES[name].require()
        return RUNTIMES[name]
    for runtime in found:
        if runtime.installed:
            return runtime
    found[0].require()
    return found[0]


@contextlib.contextmanager
def open_session(
    path: Path,
    runtime: str | None = None,
    *,
    context: int | None = None,
    threads: int | None = None,
) -> Iterator[Session]:
    """The file at `path`, running; closed when the block ends."""
    session = runtime_for(path, runtime).open(path, context, threads)
    try:
        yield session
    finally:
        session.close()
