"""Blocks that are applied twice from the beginning, from the middle on, and never: equal FLOPs.

    mobilellm prepare wikipedia.jsonl.gz --out data/wiki --vocab-size 2048
    python benchmarks/late_sharing.py --data data/wiki --work FOLDER
    python benchmarks/late_sharing.py --smoke

All arms of a seed take as many FLOPs as `--steps` of the plain network; those that start anew see
the text in another order from there on, the same for both. The rate rises, stays, and falls over
the last half of the FLOPs. "late" trains the plain network for the first half, starts a run from it
whose blocks are applied twice (`--start.from` with `--model.override layer_repeats=2`), and lets
the rate fall there. Its second run begins with fresh moments of the optimizer. "late, plain" does
the same without applying blocks twice, so that what the fresh start does is told from what the
sharing does.

Prints held-out bits a byte with paired intervals over the seeds, and writes
benchmarks/results/late_sharing.json. Runs that `--work` holds finished are read, not trained again;
what was begun there is begun anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mobilellm.data.token_folder import TokenFolder
from mobilellm.files import write_json
from mobilellm.hardware.description import describe
from mobilellm.intervals import paired
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.start import train

RESULT = Path(__file__).parent / "results" / "late_sharing.json"
LENGTH, BATCH_TOKENS, WARMUP = 256, 2048, 20
BASE = "never"


def recipe(
    arguments: argparse.Namespace, steps: int, seed: int, shared: bool, schedule: dict[str, Any]
) -> Recipe:
    """The quickstart's settings with another schedule."""
    values: dict[str, Any] = {
        "model": {"preset": arguments.preset, "initial_residual": "zero"},
        "data": {"path": str(arguments.data), "sequence_length": LENGTH},
        "train": {
            "steps": steps,
            "batch_tokens": BATCH_TOKENS,
            "seed": seed,
            "precision": "fp32",
            "compile": "off" if arguments.smoke else "auto",
            "evaluate_every": 0,
            "checkpoint_every": 10**6,
            "threads": arguments.threads,
        },
        "optimizer": {"name": "muon", "learning_rate": 4e-3, "final_lr_fraction": 0.02} | schedule,
    }
    if shared:
        values["model"]["override"] = {"layer_repeats": 2}
    return Recipe.from_dict(values)


def whole(arguments: argparse.Namespace, name: str, steps: int, seed: int) -> float:
    """One run: held-out bits a byte."""
    schedule = {"schedule": "wsd", "decay_steps": steps // 2, "warmup_steps": WARMUP}
    values = recipe(arguments, steps, seed, name == "from the beginning", schedule)
    return scored(arguments, name, seed, values)


def halves(arguments: argparse.Namespace, name: str, steps: tuple[int, int], seed: int) -> float:
    """A plain run, and a second one that starts from it: held-out bits a byte of the latter."""
    first = arguments.work / f"half-{seed}"
    kept = {"schedule": "constant", "warmup_steps": WARMUP}
    bits_of(first, recipe(arguments, steps[0], seed, False, kept))
    falling = {"schedule": "linear", "warmup_steps": 0}
    values = recipe(arguments, steps[1], seed, name == "late", falling).to_dict()
    # Another order of the text, the same for both arms.
    values["train"]["seed"] = seed + 1000
    values["start"]["from"] = str(first)
    values["model"]["preset"] = ""
    return scored(arguments, name, seed, Recipe.from_dict(values))


def scored(arguments: argparse.Namespace, name: str, seed: int, values: Recipe) -> float:
    """An arm's last run: held-out bits a byte."""
    return bits_of(arguments.work / f"{name}-{seed}".replace(" ", "-").replace(",", ""), values)


def bits_of(run: Path, values: Recipe) -> float:
    """Held-out bits a byte of a run, which is trained where it is not finished."""
    known = run / "held_out.json"
    if known.is_file():
        return float(json.loads(known.read_text()))
    shutil.rmtree(run, ignore_errors=True)
    held_out = train(run, values).held_out
    assert held_out is not None
    write_json(known, held_out.bits_per_byte)
    return held_out.bits_per_byte


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, help="a folder made by `mobilellm prepare`")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--preset", default="1M")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps on the shipped sample")
    parser.add_argument("--save", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        arguments.work = arguments.work or Path(name)
        if arguments.smoke:
            arguments.steps, arguments.seeds, arguments.data = 8, 2, Path(name) / "data"
            sample = files("mobilellm") / "sample" / "tiny_shakespeare.txt.gz"
            prepare([Source("sample", [Path(str(sample))])], arguments.data, vocab_size=300)
        elif arguments.data is None:
            parser.error("give --data, or --smoke")
        arguments.work.mkdir(parents=True, exist_ok=True)
        record = measured(arguments)
    if not arguments.smoke or arguments.save != RESULT:
        write_json(arguments.save, record)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All arms, seed by seed."""
    vocabulary = TokenFolder.open(arguments.data).vocab_size
    plain, shared = (
        ModelCosts.of(
            ModelConfig.preset(arguments.preset, vocab_size=vocabulary, layer_repeats=repeats)
        ).flops_per_token(LENGTH)["palm"]
        for repeats in (1, 2)
    )
    half = arguments.steps // 2
    later, shared_steps = (round(n * plain / shared) for n in (half, 2 * half))
    scores: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        found = {
            BASE: whole(arguments, BASE, 2 * half, seed),
            "from the beginning": whole(arguments, "from the beginning", shared_steps, seed),
            "late": halves(arguments, "late", (half, later), seed),
            "late, plain": halves(arguments, "late, plain", (half, half), seed),
        }
        for name, bits in found.items():
            scores.setdefault(name, []).append(bits)
    steps = {BASE: [2 * half], "from the beginning": [shared_steps]}
    steps |= {"late": [half, later], "late, plain": [half, half]}
    compared = {}
    for name, values in scores.items():
        line = f"{name:<20}{sum(values) / len(values):8.4f} bits a byte"
        if name != BASE and arguments.seeds > 1:
            difference = paired(scores[BASE], values)
            compared[name] = {"mean": difference.mean, "half_interval_95": difference.half}
            line += f"  {difference.mean:+.4f} +- {difference.half:.4f} against {BASE}"
        print(line)
    late = paired(scores["from the beginning"], scores["late"]) if arguments.seeds > 1 else None
    return {
        "benchmark": "late_sharing",
        "date": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"},
        "preset": arguments.preset,
        "data": TokenFolder.open(arguments.data).fingerprint,
        "tokens_a_step": BATCH_TOKENS,
        "flops_a_token": {"plain": plain, "applied twice": shared},
        "steps": steps,
        "bits_per_byte": scores,
        f"against {BASE}": compared,
        "late against from the beginning": late
        and {"mean": late.mean, "half_interval_95": late.half},
    }


if __name__ == "__main__":
    main()
