"""What runs in a process of its own for each measurement: one file in one runtime, or the memory.

    python -m mobilellm.profiling.child REQUEST RESULT_FD

REQUEST is JSON; the result, JSON too, goes to the file descriptor RESULT_FD, since libraries of
others print to standard output whatever they like. A process of its own makes load and peak memory
those of the one file, and a runtime that crashes takes nothing with it. It ends with its standard
input, so that none outlives a command that was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilellm.budget import held
from mobilellm.errors import UserError, first_line
from mobilellm.hardware.bandwidth import memory_bandwidth
from mobilellm.hardware.device_memory import forget_peak, peak_memory
from mobilellm.hardware.energy import EnergyMeter
from mobilellm.profiling.operators import operators
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.session import Session
from mobilellm.runtimes.table import RUNTIMES

SEED = 20240222


def prompt_of(length: int, vocab_size: int) -> list[int]:
    """The tokens of the prompt: drawn over the vocabulary, the same for every runtime."""
    return np.random.default_rng(SEED).integers(0, vocab_size, length).tolist()


def measure(path: Path, runtime: str, prompt: int, generate: int, threads: int) -> dict[str, Any]:
    """One repeat of one file: load, first run, a prompt, and tokens one after the other.

    The prompt is run twice and the second run is timed, as a runtime may prepare for a shape when
    it first meets it. What the runtime imports from Python is imported before anything is counted.
    """
    entry = RUNTIMES[runtime]
    for module in (entry.package, *entry.imports):
        importlib.import_module(module)
    cpu, meter = torch.device("cpu"), EnergyMeter()
    forget_peak()
    before, start = held(), time.perf_counter()
    session = entry.open(path, prompt + generate, threads)
    load = time.perf_counter() - start
    ids = prompt_of(prompt, session.vocab_size)
    start = time.perf_counter()
    session.feed(ids[:1])
    initialize = time.perf_counter() - start
    session.reset()
    session.feed(ids)
    session.reset()
    start = time.perf_counter()
    token = int(session.feed(ids).argmax())
    first = time.perf_counter() - start
    times, used = [], meter.joules()
    for _ in range(generate):
        start = time.perf_counter()
        token = int(session.feed([token]).argmax())
        times.append(time.perf_counter() - start)
    joules = meter.since(used)
    found: dict[str, Any] = {
        "load_ms": 1e3 * load,
        "initialize_ms": 1e3 * initialize,
        "first_token_ms": 1e3 * first,
        "prefill_tokens_per_second": prompt / first,
        "decode_tokens_per_second": generate / sum(times),
        "token_ms_p50": 1e3 * float(np.quantile(times, 0.5)),
        "token_ms_p90": 1e3 * float(np.quantile(times, 0.9)),
        "peak_memory_bytes": max(0, peak_memory(cpu) - before),
    }
    if joules is not None:
        found["joules_per_token"] = joules / generate
    return {"figures": found} | own_bytes(session)


def own_bytes(session: Session) -> dict[str, int]:
    """Of our network: bytes of the weights that a token reads, each once, and of a number in its
    cache; empty for other runtimes."""
    if not isinstance(session, NetworkSession):
        return {}
    network = session.network
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    if not network.config.tie_word_embeddings:
        # a row of it is looked up
        tensors = {k: v for k, v in tensors.items() if not k.startswith("embed_tokens.")}
    distinct = {t.data_ptr(): t for name, t in tensors.items() if name not in ("cos", "sin")}
    return {
        "weight_bytes": sum(t.numel() * t.element_size() for t in distinct.values()),
        "cache_number_bytes": network.norm.weight.element_size(),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is asked for; an `error` in its place where a runtime refuses."""
    threads = int(request["threads"])
    torch.set_num_threads(threads)
    try:
        if request["kind"] == "bandwidth":
            return {"figures": memory_bandwidth(request["seconds"], request["array_bytes"])}
        path, runtime = Path(request["file"]), str(request["runtime"])
        prompt, generate = int(request["prompt"]), int(request["generate"])
        if request["kind"] == "operators":
            session = RUNTIMES[runtime].open(path, prompt + generate, threads)
            return {"operators": operators(session, prompt_of(prompt, session.vocab_size))}
        return measure(path, runtime, prompt, generate, threads)
    except UserError as error:
        return {"error": error.what, "hint": error.hint, "user": True}
    except Exception as error:  # whatever a runtime raises is a row that failed
        return {"error": f"{type(error).__name__}: {first_line(error)}", "hint": "", "user": False}


def main() -> None:
    """Answer one request. The process ends without the interpreter's teardown: what a library does
    there is no part of the measurement."""

    def end_with_input() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=end_with_input, daemon=True).start()
    with os.fdopen(int(sys.argv[2]), "w") as result:
        json.dump(answer(json.loads(sys.argv[1])), result)
    os._exit(0)


if __name__ == "__main__":
    main()
