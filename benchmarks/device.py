"""Tokens a second of one model in every runtime that is installed, from files that this toolkit
writes, and the ratios that the project aims at.

    python benchmarks/device.py runs/smollm2            # a checkpoint of SmolLM2-135M
    python benchmarks/device.py runs/smollm2 --files exports   # files that are there already
    python benchmarks/device.py --smoke                 # the same program, tiny, on any machine

Each target of `convert` writes each of its number types whose runtime is installed (a missing one
is said), `profile` measures all files in turns, and each aim is a ratio of two medians of the same
run. Our own network holds weights as its file does: float32, bf16, or the integers of a quantized
checkpoint, and each is set against llama.cpp at the same width. Prints a table and writes
benchmarks/results/device.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.files import write_json
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.profiling.device_profile import DeviceProfile
from mobilellm.profiling.profile import profile
from mobilellm.quantize.methods import quantized_network
from mobilellm.runtimes.table import RUNTIMES
from mobilellm.terminal.profile_table import profile_lines
from mobilellm.workflows.convert import convert

RESULT = Path(__file__).parent / "results" / "device.json"
# Name of the file, target, number type, runtime that has to be installed.
FILES = (
    ("fp32", "hf", "F32", "mobilellm"),
    ("bf16", "hf", "BF16", "mobilellm"),
    ("int4", "quantized", "int4", "mobilellm"),
    ("f32.gguf", "gguf", "F32", "llama.cpp"),
    ("bf16.gguf", "gguf", "BF16", "llama.cpp"),
    ("q8_0.gguf", "gguf", "Q8_0", "llama.cpp"),
    ("q4_0.gguf", "gguf", "Q4_0", "llama.cpp"),
    ("onnx", "onnx", "ALL", "onnxruntime"),
    ("executorch", "executorch", "INT4", "executorch"),
)
PREFILL, DECODE = "prefill_tokens_per_second", "decode_tokens_per_second"
Which = tuple[str, str]
"""Name of a file and the runtime that runs it."""
Q4_0: Which = ("q4_0.gguf", "llama.cpp")
# What is measured, ours, theirs, the ratio to reach.
AIMS: tuple[tuple[str, Which, Which, float], ...] = (
    (DECODE, ("executorch", "executorch"), Q4_0, 1.4),
    (PREFILL, ("executorch", "executorch"), Q4_0, 1.6),
    (DECODE, ("onnx", "onnxruntime"), Q4_0, 1.1),
    (PREFILL, ("onnx", "onnxruntime"), Q4_0, 1.6),
    (DECODE, ("onnx", "onnxruntime-genai"), Q4_0, 1.1),
    (PREFILL, ("onnx", "onnxruntime-genai"), Q4_0, 1.6),
    (DECODE, ("fp32", "mobilellm"), ("f32.gguf", "llama.cpp"), 1.0),
    (DECODE, ("bf16", "mobilellm"), ("bf16.gguf", "llama.cpp"), 1.0),
    (DECODE, ("int4", "mobilellm"), Q4_0, 0.8),
)
INT8 = Path("onnx") / "onnx" / "model_int8.onnx"
"""A file within the onnx folder, of which a folder's runtimes take another."""


def write_files(
    model: Path, folder: Path, wanted: Sequence[tuple[str, str, str, str]], ready: Path | None
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files by name, those in `ready` as they are and the others made in `folder`; and for each
    how long it took or why it is missing. Files are not run here: they are measured, and `convert`
    without its check is what is timed."""
    found: dict[str, Path] = {}
    said: dict[str, Any] = {}
    for name, target, number_type, runtime in wanted:
        if not RUNTIMES[runtime].installed:
            said[name] = {"missing": f"{runtime} is not installed"}
            continue
        if ready is not None and (ready / name).exists():
            found[name] = ready / name
            said[name] = {"ready": True}
            continue
        start = time.perf_counter()
        try:
            if target == "quantized":
                write_quantized(model, folder / name, number_type)
            else:
                convert(model, folder / name, target, precision=number_type, verify=False)
        except UserError as error:
            said[name] = {"missing": str(error)}
            continue
        found[name] = folder / name
        said[name] = {"seconds": time.perf_counter() - start}
    return found, said


def write_quantized(model: Path, folder: Path, scheme: str) -> None:
    """A quantized checkpoint by plain rounding: what its numbers are makes no difference to its
    speed."""
    loaded = load(model)
    quantized = quantized_network(loaded.network, scheme, "round", "int8")
    folder.mkdir()
    save_checkpoint(folder, loaded.network, loaded.tokenizer, loaded.origin)
    quantized.save(folder, loaded.config)


def measure(
    files: dict[str, Path], prompt: int, generate: int, repeats: int, threads: int
) -> DeviceProfile:
    """The profile of all files, their rows under the names here. It is one run of `profile`, so
    that all take turns."""
    paths = list(files.values())
    found = profile(
        paths,
        prompt=prompt,
        generate=generate,
        repeats=repeats,
        threads=threads,
        say=lambda text: print(text, file=sys.stderr),
    )
    names = {str(path): name for name, path in files.items()}
    for row in found["rows"]:
        # No path of the machine that measured: the names say which file it is.
        row["file"] = row["name"] = names[row["file"]]
    return found


def ratios(found: DeviceProfile) -> list[dict[str, Any]]:
    """Each aim whose two sides were measured."""
    medians = {
        (row["name"], row["runtime"]): {
            key: value["median"] for key, value in row["figures"].items()
        }
        for row in found["rows"]
        if row["error"] is None
    }
    return [
        {"what": what, "ours": list(ours), "theirs": list(theirs), "aim": aim}
        | {"ratio": (ratio := medians[ours][what] / medians[theirs][what]), "holds": ratio >= aim}
        for what, ours, theirs, aim in AIMS
        if ours in medians and theirs in medians
    ]


def tiny(folder: Path) -> Path:
    """A checkpoint with random weights, as small as every target takes."""
    from mobilellm.interop.folder import save_checkpoint
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import train_bpe

    config = ModelConfig.preset("1M", vocab_size=300, num_hidden_layers=2)
    tokenizer = train_bpe([(__doc__ or "") * 9], config.vocab_size)
    folder.mkdir()
    save_checkpoint(folder, Network(config).eval(), tokenizer, {"made_by": "benchmarks/device.py"})
    return folder


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint, as `convert` reads it")
    parser.add_argument("--files", type=Path, help="a folder of files, named as in the table")
    parser.add_argument("--only", nargs="+", choices=[name for name, *_ in FILES])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, once")
    parser.add_argument("--save", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.model is None and not arguments.smoke:
        parser.error("give a model, or --smoke")
    wanted = [entry for entry in FILES if not arguments.only or entry[0] in arguments.only]
    lengths = (16, 4, 1, 1) if arguments.smoke else (
        arguments.prompt, arguments.generate, arguments.repeats, arguments.threads
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny(folder / "model") if arguments.smoke else arguments.model
        files, written = write_files(model, folder, wanted, arguments.files)
        for file, said in written.items():
            print(file, json.dumps(said))
        inside = files["onnx"].parent / INT8 if "onnx" in files else None
        if inside is not None and inside.is_file():
            files["onnx int8"] = inside
        load_before = os.getloadavg()[0]
        found = measure(files, *lengths)
    result = {
        "written": written,
        "load_before": load_before,
        "aims": ratios(found),
        "profile": found,
    }
    print("\n".join(profile_lines(found, 200)))
    for aim in result["aims"]:
        print(
            f"{aim['what'].removesuffix('_tokens_per_second')}: {' in '.join(aim['ours'])} over "
            f"{' in '.join(aim['theirs'])}: {aim['ratio']:.2f} (aim {aim['aim']}, "
            f"{'holds' if aim['holds'] else 'does not hold'})"
        )
    if not arguments.smoke or arguments.save != RESULT:
        write_json(arguments.save, result)


if __name__ == "__main__":
    main()
