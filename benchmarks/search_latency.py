"""How well the design search predicts the time of a token: ten shapes that it never saw.

    python benchmarks/search_latency.py --tokenizer runs/smollm2
    python benchmarks/search_latency.py --smoke   # the same program, tiny, anywhere

The shapes of `mobilellm search --shapes` and ten others, drawn at random within their range, all
with random weights, are profiled in turns: by our own network in float32 and in int4, and by
llama.cpp in Q4_0. The prices are fitted to the first and predict the others (lab/latency.py). The
tokenizer is that of any model; its vocabulary is that of the networks. Prints a table and writes
benchmarks/results/search_latency.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mobilellm.files import write_json
from mobilellm.hardware.description import describe
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.lab.latency import LatencyModel
from mobilellm.lab.search import sample_shapes
from mobilellm.lab.shapes import ShapeRule, shaped
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.profiling.profile import profile
from mobilellm.runtimes.table import RUNTIMES
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert
from mobilellm.workflows.quantize import quantize

RESULT = Path(__file__).parent / "results" / "search_latency.json"
RULE = ShapeRule(head_dim=32, ffn_multiple=32)
UNSEEN = 10
KINDS = {"ours fp32": "mobilellm", "ours int4": "mobilellm", "llama.cpp Q4_0": "llama.cpp"}


def unseen_shapes(config: ModelConfig, seen: list[ModelConfig], count: int) -> list[ModelConfig]:
    """Shapes drawn at random within the range of those that were seen, none of which is one."""
    draw = random.Random(0)
    taken = {(shape.num_hidden_layers, shape.hidden_size) for shape in seen}
    found: list[ModelConfig] = []
    while len(found) < count:
        depth, heads = draw.randint(2, 30), draw.randint(3, 12)
        if (depth, heads * RULE.head_dim) in taken:
            continue
        taken.add((depth, heads * RULE.head_dim))
        repeats = 2 if depth <= 15 and draw.random() < 0.3 else 1
        base = dataclasses.replace(config, num_hidden_layers=depth, layer_repeats=repeats)
        found.append(shaped(base, heads * RULE.head_dim, RULE))
    return found


def files_of(
    shapes: list[ModelConfig], kind: str, folder: Path, tokenizer: Tokenizer
) -> list[Path]:
    """A file or folder of each shape, in that kind's format."""
    paths = []
    for number, shape in enumerate(shapes):
        torch.manual_seed(0)
        place = folder / f"{number}"
        place.mkdir(parents=True)
        model = place / "model"
        model.mkdir()
        save_checkpoint(model, Network(shape).eval(), tokenizer, {"made_by": Path(__file__).name})
        if kind == "ours int4":
            quantize(model, place / "int4", scheme="int4", method="round")
            paths.append(place / "int4")
        elif kind == "llama.cpp Q4_0":
            convert(model, place / "m.gguf", "gguf", precision="Q4_0", verify=False)
            paths.append(place / "m.gguf")
        else:
            paths.append(model)
    return paths


def name_of(shape: ModelConfig) -> str:
    """Depth, repeats and width."""
    repeats = f" x {shape.layer_repeats}" if shape.layer_repeats > 1 else ""
    return f"{shape.num_hidden_layers}{repeats} layers, {shape.hidden_size}"


def measure(
    kind: str,
    seen: list[ModelConfig],
    others: list[ModelConfig],
    tokenizer: Tokenizer,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Fit, predict and compare for one kind of file."""
    with tempfile.TemporaryDirectory() as name:
        paths = files_of(seen + others, kind, Path(name), tokenizer)
        found = profile(
            paths,
            prompt=arguments.prompt,
            generate=arguments.generate,
            repeats=arguments.repeats,
            threads=arguments.threads,
            runtimes=(KINDS[kind],),
            say=lambda text: print(text, file=sys.stderr),
        )
    by_path = {row["file"]: row for row in found["rows"]}
    failed = [path for path in paths if "token_ms_p50" not in by_path[str(path)]["figures"]]
    if failed:
        raise SystemExit(f"{kind}: {len(failed)} of {len(paths)} files were not measured")
    rows = [by_path[str(path)] for path in paths]
    model = LatencyModel.fit({**found, "rows": rows[: len(seen)]}, KINDS[kind])
    compared = []
    for shape, row in zip(others, rows[len(seen) :], strict=True):
        figure = row["figures"]["token_ms_p50"]["median"]
        predicted = model.milliseconds(shape)
        compared.append(
            {
                "shape": name_of(shape),
                "bytes": row["bytes"],
                "predicted_ms": predicted,
                "measured_ms": figure,
                "off": predicted / figure - 1,
            }
        )
    sizes = [abs(each["off"]) for each in compared]
    return {
        "kind": kind,
        "prices": model.prices.terms,
        "near_parameters": model.prices.near if math.isfinite(model.prices.near) else None,
        "left_out_mean": model.error,
        "left_out_worst": model.worst,
        "mean": statistics.fmean(sizes),
        "worst": max(sizes),
        "shapes": compared,
        "seen": [
            {
                "shape": name_of(shape),
                "bytes": row["bytes"],
                "facts": row["model"],
                "measured_ms": row["figures"]["token_ms_p50"]["median"],
            }
            for shape, row in zip(seen, rows, strict=False)
        ],
    }


def record(arguments: argparse.Namespace, kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written, after each kind."""
    return {
        "benchmark": "search_latency",
        "date": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"},
        "settings": {
            key: getattr(arguments, key) for key in ("prompt", "generate", "repeats", "threads")
        },
        "load": os.getloadavg()[0],
        "kinds": kinds,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokenizer", type=Path, help="any model with a tokenizer")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--generate", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="few tiny shapes, once")
    parser.add_argument("--save", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.prompt, arguments.generate, arguments.repeats = 8, 4, 1
        tokenizer = train_bpe([(__doc__ or "") * 9], 300)
    elif arguments.tokenizer is None:
        parser.error("give --tokenizer, or --smoke")
    else:
        tokenizer = load(arguments.tokenizer).require_tokenizer()
    config = ModelConfig.preset("125M", vocab_size=tokenizer.vocab_size)
    seen = sample_shapes(config, RULE)
    others = unseen_shapes(config, seen, UNSEEN)
    if arguments.smoke:
        seen, others = (
            sorted(shapes, key=lambda shape: shape.num_hidden_layers * shape.hidden_size)
            for shapes in (seen, others)
        )
        seen, others = seen[:4], others[:1]
    kinds = []
    for kind in arguments.only:
        if not RUNTIMES[KINDS[kind]].installed:
            print(f"{kind}: {KINDS[kind]} is not installed", file=sys.stderr)
            continue
        found = measure(kind, seen, others, tokenizer, arguments)
        kinds.append(found)
        if not arguments.smoke or arguments.save != RESULT:
            write_json(arguments.save, record(arguments, kinds))
        print(
            f"{kind}: off by {found['mean']:.1%} on average and {found['worst']:.1%} at most on "
            f"{len(others)} unseen shapes; {found['left_out_mean']:.1%} where each of the "
            f"{len(seen)} seen is left out in turn"
        )
        for each in found["shapes"]:
            print(
                f"  {each['shape']:<24}{each['bytes'] / 1e6:7.1f} MB{each['predicted_ms']:9.2f} ms"
                f" predicted{each['measured_ms']:9.2f} measured{each['off']:+8.1%}"
            )


if __name__ == "__main__":
    main()
