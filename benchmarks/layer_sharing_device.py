"""What running blocks twice costs on a device: the paper's table 7, for every installed runtime.

    python benchmarks/layer_sharing_device.py --tokenizer runs/smollm2
    python benchmarks/layer_sharing_device.py --smoke   # the same program, tiny, anywhere

Four networks of one width with random weights: 30 blocks, the same 30 applied twice with keys and
values of their own or those of the first application, and 60 blocks. Each in float32 by our own
network, 16 bits and 4 bits by llama.cpp (whose format stores a block that is applied twice two
times), float32 and 4 bits by onnxruntime, and with --executorch 4 bits by ExecuTorch (minutes of
export a file). All files of a kind are measured in turns. The tokenizer is that of any model; its
vocabulary is that of the networks. Prints a table and writes
benchmarks/results/layer_sharing_device.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mobilellm.errors import UserError
from mobilellm.files import write_json
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.profiling.profile import profile
from mobilellm.runtimes.table import RUNTIMES
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

RESULT = Path(__file__).parent / "results" / "layer_sharing_device.json"
# Name, then what differs from the preset.
SHAPES: dict[str, dict[str, Any]] = {
    "30 blocks": {},
    "30 twice": {"layer_repeats": 2},
    "30 twice, keys of the first": {"layer_repeats": 2, "shared_kv": "first"},
    "60 blocks": {"num_hidden_layers": 60},
}
# Kind, target of convert (none: the checkpoint itself), number type, name of the file, runtime.
KINDS = (
    ("ours fp32", "", "F32", "m", "mobilellm"),
    ("llama.cpp F16", "gguf", "F16", "m.gguf", "llama.cpp"),
    ("llama.cpp Q4_0", "gguf", "Q4_0", "m.gguf", "llama.cpp"),
    ("onnxruntime fp32", "onnx", "F32", "m", "onnxruntime"),
    ("onnxruntime q4", "onnx", "INT4", "m", "onnxruntime"),
    ("executorch int4", "executorch", "INT4", "m", "executorch"),
)
# Table 7 of arXiv 2402.14905: iPhone 13, iOS 17.2.1, ExecuTorch with MPS, FP16, mean of 50 runs.
PAPER = {
    "30 blocks": {"load_ms": 39.2, "initialize_ms": 1361.7, "execute_ms": 15.6},
    "30 twice": {"load_ms": 43.6, "initialize_ms": 1388.2, "execute_ms": 16.0},
    "60 blocks": {"load_ms": 68.6, "initialize_ms": 3347.7, "execute_ms": 29.0},
}
SHOWN = ("load_ms", "initialize_ms", "token_ms_p50")


def networks(folder: Path, preset: str, tokenizer: Tokenizer) -> dict[str, Path]:
    """A checkpoint of each shape."""
    found = {}
    for number, (name, differs) in enumerate(SHAPES.items()):
        overrides = dict(differs)
        if preset == "1M" and "num_hidden_layers" in overrides:
            overrides["num_hidden_layers"] = 2 * ModelConfig.preset(preset).num_hidden_layers
        config = ModelConfig.preset(preset, vocab_size=tokenizer.vocab_size, **overrides)
        torch.manual_seed(0)
        path = folder / f"shape{number}"
        path.mkdir()
        save_checkpoint(path, Network(config).eval(), tokenizer, {"made_by": Path(__file__).name})
        found[name] = path
    return found


def measure(
    models: dict[str, Path], kind: tuple[str, str, str, str, str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each shape of one kind, all in turns."""
    title, target, number_type, file_name, runtime = kind
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        files: dict[str, Path] = {}
        for number, (shape, model) in enumerate(models.items()):
            if not target:
                files[shape] = model
                continue
            place = Path(name) / str(number)
            place.mkdir()
            try:
                convert(model, place / file_name, target, precision=number_type, verify=False)
            except UserError as error:
                rows.append({"kind": title, "shape": shape, "error": error.what})
                continue
            files[shape] = place / file_name
        found = profile(
            list(files.values()),
            prompt=arguments.prompt,
            generate=arguments.generate,
            repeats=arguments.repeats,
            threads=arguments.threads,
            runtimes=(runtime,),
            say=lambda text: print(text, file=sys.stderr),
        )
        shapes = {str(path): shape for shape, path in files.items()}
        for row in found["rows"]:
            rows.append(
                {
                    "kind": title,
                    "shape": shapes[row["file"]],
                    "bytes": row["bytes"],
                    "figures": row["figures"],
                    "bandwidth_share": row["bandwidth_share"],
                    "error": row["error"],
                }
            )
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Each kind, with ratios to its 30 blocks."""
    print(f"{'':<18}{'':<29}{'MB':>8}{'load ms':>9}{'init ms':>9}{'ms/token':>10}{'ratio':>7}")
    base = 0.0
    for row in rows:
        if row.get("error"):
            print(f"{row['kind']:<18}{row['shape']:<29}{row['error']}")
            continue
        load_ms, init_ms, token_ms = (row["figures"][key]["median"] for key in SHOWN)
        if row["shape"] == next(iter(SHAPES)):
            base = token_ms
        ratio = f"{token_ms / base:7.2f}" if base else ""
        print(
            f"{row['kind']:<18}{row['shape']:<29}{row['bytes'] / 1e6:8.1f}{load_ms:9.1f}"
            f"{init_ms:9.1f}{token_ms:10.2f}{ratio}"
        )
    for shape, figures in PAPER.items():
        values = "".join(f"{value:9.1f}" for value in figures.values())
        ratio = figures["execute_ms"] / PAPER["30 blocks"]["execute_ms"]
        print(f"{'the paper, FP16':<18}{shape:<29}{'':8}{values} {ratio:7.2f}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="any model with a tokenizer")
    parser.add_argument("--executorch", action="store_true", help="export to it, too")
    parser.add_argument("--only", nargs="+", choices=[kind[0] for kind in KINDS])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, once")
    parser.add_argument("--save", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.prompt, arguments.generate, arguments.repeats = 8, 4, 1
        tokenizer = train_bpe([(__doc__ or "") * 9], 300)
    elif arguments.tokenizer is None:
        parser.error("give --tokenizer, or --smoke")
    else:
        tokenizer = load(arguments.tokenizer).require_tokenizer()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        models = networks(Path(name), "1M" if arguments.smoke else "125M", tokenizer)
        for kind in KINDS:
            if arguments.only and kind[0] not in arguments.only:
                continue
            if kind[1] == "executorch" and not arguments.executorch:
                continue
            if not RUNTIMES[kind[4]].installed:
                print(f"{kind[0]}: {kind[4]} is not installed", file=sys.stderr)
                continue
            rows += measure(models, kind, arguments)
    print_rows(rows)
    record = {
        "benchmark": "layer_sharing_device",
        "settings": {
            key: getattr(arguments, key) for key in ("prompt", "generate", "repeats", "threads")
        },
        "load": os.getloadavg()[0],
        "rows": rows,
        "paper": PAPER,
    }
    if not arguments.smoke or arguments.save != RESULT:
        write_json(arguments.save, record)


if __name__ == "__main__":
    main()
