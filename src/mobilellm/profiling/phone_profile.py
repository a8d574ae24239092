"""The same figures on an Android phone, by the programs that the runtimes' makers measure with.

    found = profile_phone([Path("m.gguf")], runners=Path("android-arm64"), prompt=512)

| file | program | from |
|---|---|---|
| .gguf | llama-bench | llama.cpp, built with the Android NDK |
| .pte | llama_main | ExecuTorch, examples/models/llama |
| .onnx | onnxruntime_perf_test | onnxruntime, built with --android |

They lie in one folder, with the shared libraries that they need. A program tells less than our own
measurement: what it leaves out is left out.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.profiling.bytes_read import config_of, model_facts
from mobilellm.profiling.device_profile import (
    FORMAT,
    FORMAT_VERSION,
    DeviceProfile,
    Figure,
    ProfileRow,
    figure,
    one_line,
)
from mobilellm.profiling.phone import Phone, PhoneError
from mobilellm.profiling.profile import content, labels
from mobilellm.version import __version__

FLOAT, INT64 = 1, 7
"""ONNX's numbers of element types."""
MAX_SLOTS = 4096


class UnreadableError(Exception):
    """Output in which the figures are not found."""


@dataclass(frozen=True)
class Settings:
    """How long the texts are, and how often each file is measured."""

    prompt: int
    generate: int
    repeats: int
    threads: int


Figures = dict[str, Figure]


@dataclass(frozen=True)
class PhoneRunner:
    """A program that measures one kind of file."""

    runtime: str
    program: str
    measure: Callable[[Phone, Path, Settings], Figures]


def spread(middle: float, low: float, high: float) -> Figure:
    """A figure of which a program tells median and extremes alone."""
    return {"median": middle, "lowest": low, "highest": high, "values": [middle]}


def llama_bench(phone: Phone, file: Path, settings: Settings) -> Figures:
    """A GGUF file: prompt and tokens in turns of their own."""
    phone.push(file, "model.gguf")
    text = phone.run(
        f"./llama-bench -m model.gguf -p {settings.prompt} -n {settings.generate} "
        f"-r {settings.repeats} -t {settings.threads} -o json".split()
    )
    begin, end = text.find("["), text.rfind("]")
    try:
        tests = json.loads(text[begin : end + 1])
        (prompt,) = (t for t in tests if t["n_prompt"] and not t["n_gen"])
        (decode,) = (t for t in tests if t["n_gen"] and not t["n_prompt"])
        return {
            "first_token_ms": figure([float(ns) / 1e6 for ns in prompt["samples_ns"]]),
            "prefill_tokens_per_second": figure([float(v) for v in prompt["samples_ts"]]),
            "decode_tokens_per_second": figure([float(v) for v in decode["samples_ts"]]),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UnreadableError(f"llama-bench printed no figures ({one_line(repr(error))})") from None


def llama_main(phone: Phone, file: Path, settings: Settings) -> Figures:
    """A .pte file: a process a repeat, with a text of about as many tokens as asked for."""
    beside = [file.parent / name for name in ("tokenizer.model", "tokenizer.json")]
    beside += [file.with_name(f"{file.stem}.{path.name}") for path in beside]
    found = [path for path in beside if path.is_file()]
    if not found:
        raise UnreadableError(
            "no tokenizer.json or tokenizer.model beside it, which llama_main needs"
        )
    tokenizer = "tokenizer" + found[0].suffix
    phone.push(file, "model.pte")
    phone.push(found[0], tokenizer)
    words = [
        "./llama_main",
        "--model_path=model.pte",
        f"--tokenizer_path={tokenizer}",
        "--prompt=" + "one " * settings.prompt,
        f"--seq_len={settings.prompt + settings.generate}",
        f"--cpu_threads={settings.threads}",
        "--temperature=0",
        "--warmup=true",
    ]
    runs = [observed(phone.run(words)) for _ in range(settings.repeats)]
    return {key: figure([run[key] for run in runs]) for key in runs[0]}


def observed(text: str) -> dict[str, float]:
    """The figures in what llama_main prints: the last line of its observer, load from the first."""
    lines = re.findall(r"PyTorchObserver (\{.*\})", text)
    try:
        seen = [{key: float(value) for key, value in json.loads(line).items()} for line in lines]
        last = seen[-1]
        first_token = last["prompt_eval_end_ms"] - last["inference_start_ms"]
        writing = last["inference_end_ms"] - last["prompt_eval_end_ms"]
        return {
            "load_ms": max(s["model_load_end_ms"] - s["model_load_start_ms"] for s in seen),
            "first_token_ms": first_token,
            "prefill_tokens_per_second": 1000 * last["prompt_tokens"] / first_token,
            "decode_tokens_per_second": 1000 * last["generated_tokens"] / writing,
        }
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError):
        raise UnreadableError("llama_main printed no line of its observer with figures") from None


def perf_test(phone: Phone, file: Path, settings: Settings) -> Figures:
    """An .onnx file: the prompt with an empty cache, then a token after it, over and over."""
    shape = cache_shape(file)
    phone.push(file, "model.onnx")
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        for new, past, runs in (
            (settings.prompt, 0, settings.repeats),
            (1, settings.prompt, settings.generate),
        ):
            phone.remove("test_data_set_0")
            phone.shell(["mkdir", f"{phone.folder}/test_data_set_0"])
            for number, tensor in enumerate(inputs(shape, new, past)):
                local = Path(folder, f"input_{number}.pb")
                local.write_bytes(tensor)
                phone.push(local, f"test_data_set_0/{local.name}")
            words = f"./onnxruntime_perf_test -e cpu -m times -r {runs} -s -x {settings.threads}"
            texts.append(phone.run([*words.split(), "model.onnx"]))
    prompt, decode = texts

    found: Figures = {}
    low, high, middle = (latency(prompt, name) for name in ("Min", "Max", "P50"))
    fast, slow = (latency(decode, name) for name in ("Min", "Max"))
    mean = number_after(decode, "Average inference time cost(?: total)?")
    values = {
        "load_ms": (1e3 * number_after(prompt, "Session creation time cost"),) * 3,
        "initialize_ms": (number_after(prompt, "First inference time cost"),) * 3,
        "first_token_ms": (middle, low, high),
        "prefill_tokens_per_second": tuple(
            1e3 * settings.prompt / ms if ms else math.nan for ms in (middle, high, low)
        ),
        "decode_tokens_per_second": tuple(
            1e3 / ms if ms else math.nan for ms in (mean, slow, fast)
        ),
        "token_ms_p50": (latency(decode, "P50"), fast, slow),
        "token_ms_p90": (latency(decode, "P90"), fast, slow),
        "peak_memory_bytes": (number_after(prompt, "Peak working set size"),) * 3,
    }
    for key, three in values.items():
        if not any(map(math.isnan, three)):
            found[key] = spread(*three)
    if "decode_tokens_per_second" not in found or "first_token_ms" not in found:
        raise UnreadableError("onnxruntime_perf_test printed no latencies")
    return found


def number_after(text: str, name: str) -> float:
    """The number after a name and a colon; NaN where there is none."""
    match = re.search(rf"{name}: ?([\d.e+-]+)", text)
    try:
        return float(match[1]) if match else math.nan
    except ValueError:
        return math.nan


def latency(text: str, which: str) -> float:
    """Milliseconds of one of onnxruntime_perf_test's latencies."""
    return 1e3 * number_after(text, f"{which} Latency")


def cache_shape(file: Path) -> tuple[int, int, int]:
    """Slots, heads and numbers a head of the cache, from the config.json of the file's folder."""
    places = [file.parent / "config.json", file.parent.parent / "config.json"]
    for place in places:
        if place.is_file():
            said = read_json(place, limit=16 << 20)
            try:
                slots, heads = int(said["num_hidden_layers"]), int(said["num_key_value_heads"])
                width = said.get("head_dim") or said["hidden_size"] // said["num_attention_heads"]
                if 0 < slots <= MAX_SLOTS and 0 < heads * int(width) <= 1 << 20:
                    return slots, heads, int(width)
            except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError):
                pass
            raise UnreadableError(f"{place} does not say the shape of the cache")
    raise UnreadableError("no config.json in its folder, which says the shape of the cache")


def inputs(shape: tuple[int, int, int], new: int, past: int) -> list[bytes]:
    """The inputs of a run as ONNX's TensorProto: `new` tokens after `past` ones."""
    slots, heads, width = shape
    empty = b"\0" * (4 * heads * past * width)
    found = [
        tensor_proto("input_ids", INT64, (1, new), struct.pack(f"<{new}q", *range(1, new + 1))),
        tensor_proto("attention_mask", INT64, (1, past + new), struct.pack("<q", 1) * (past + new)),
    ]
    for slot in range(slots):
        for part in ("key", "value"):
            name = f"past_key_values.{slot}.{part}"
            found.append(tensor_proto(name, FLOAT, (1, heads, past, width), empty))
    return found


def tensor_proto(name: str, kind: int, shape: Sequence[int], data: bytes) -> bytes:
    """A tensor in the protocol buffer that onnxruntime_perf_test reads: dims are field 1, the
    element type 2, the name 8 and the raw little-endian data 9."""

    def varint(value: int) -> bytes:
        parts = []
        while value > 127:
            parts.append(value & 127 | 128)
            value >>= 7
        return bytes([*parts, value])

    def sized(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    dims = b"".join(varint(1 << 3) + varint(size) for size in shape)
    return dims + varint(2 << 3) + varint(kind) + sized(8, name.encode()) + sized(9, data)


RUNNERS = {
    ".gguf": PhoneRunner("llama.cpp", "llama-bench", llama_bench),
    ".pte": PhoneRunner("executorch", "llama_main", llama_main),
    ".onnx": PhoneRunner("onnxruntime", "onnxruntime_perf_test", perf_test),
}


def profile_phone(
    files: Sequence[Path],
    *,
    runners: Path,
    serial: str = "",
    prompt: int = 512,
    generate: int = 128,
    repeats: int = 5,
    threads: int = 4,
    say: Callable[[str], None] = lambda _: None,
) -> DeviceProfile:
    """Measure `files` on a phone with the programs in the folder `runners`.

    A file that fails is a row that says why. Ctrl-C ends it with what was finished. `UserError`
    for files that no program runs, a program that is missing, and without adb or a phone.
    """
    settings = Settings(prompt, generate, repeats, threads)
    for name, value in vars(settings).items():
        if value < 1:
            raise UserError(f"{name} {value}: must be 1 or more")
    named = zip(labels(files), files, strict=True)
    chosen = [(name, file, runner_of(file, runners)) for name, file in named]
    rows: list[ProfileRow] = []
    interrupted = False
    with Phone.connect(serial) as phone:
        machine = phone.facts()
        try:
            for library in sorted(runners.glob("*.so")):
                phone.push(library, re.sub(r"[^\w.+-]", "_", library.name))
            for name, file, runner in chosen:
                say(f"{name}: {runner.program} on {machine.get('device', 'the phone')}")
                rows.append(measured(phone, name, file, runner, runners, settings))
                if rows[-1]["error"]:
                    say(f"{name}: failed: {rows[-1]['error']}")
        except KeyboardInterrupt:
            interrupted = True
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "made_by": f"mobilellm {__version__} profile --adb",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "settings": vars(settings),
        "bandwidth": {},
        "interrupted": interrupted,
        "rows": rows,
    }


def runner_of(file: Path, runners: Path) -> PhoneRunner:
    """What runs a file; `UserError` where nothing does, or its program is missing."""
    if not file.is_file():
        raise UserError(f"{file}: no such file", hint="on a phone give .gguf, .pte or .onnx files")
    if file.suffix not in RUNNERS:
        raise UserError(
            f"{file}: no program for such a file on a phone", hint=f"give {' or '.join(RUNNERS)}"
        )
    runner = RUNNERS[file.suffix]
    if not (runners / runner.program).is_file():
        raise UserError(
            f"{runners}: no {runner.program} in it",
            hint="--runners is a folder with the programs, built for the phone (docs/devices.md)",
        )
    return runner


def measured(
    phone: Phone, name: str, file: Path, runner: PhoneRunner, runners: Path, settings: Settings
) -> ProfileRow:
    """The row of a file; what was pushed for it is removed."""
    figures: Figures = {}
    error: str | None = None
    try:
        phone.push(runners / runner.program, runner.program, program=True)
        figures = runner.measure(phone, file, settings)
    except (PhoneError, UnreadableError) as fault:
        error = str(fault)
    finally:
        for left in ("model.gguf", "model.pte", "model.onnx", "test_data_set_0"):
            phone.remove(left)
    size, digest = content(file)
    config = config_of(file)
    return {
        "name": name,
        "file": str(file),
        "runtime": runner.runtime,
        "runtime_version": None,
        "bytes": size,
        "sha256": digest,
        "model": None if config is None else model_facts(config),
        "figures": figures,
        "bytes_per_token": None,
        "bandwidth_share": None,
        "operators": None,
        "error": error,
    }
