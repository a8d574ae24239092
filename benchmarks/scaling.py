"""How training grows from one process to two, each with one CPU thread, by `torchrun` and gloo on
this machine.

    python benchmarks/scaling.py --save benchmarks/results/scaling.json

The same recipe and global batch; speed is the median of the steps after the fifth. Two kinds: ddp
and fsdp.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer_vs_hf import set_up

WORLDS = ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
"""Processes, and how they share the work."""


def measure(
    preset: str,
    steps: int,
    precision: str,
    worlds: Sequence[tuple[int, str]] = WORLDS,
    parallel: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Tokens a second of each world, and its ratio to the first; `parallel` are further flags."""
    from mobilellm.recipe.recipe import (
        DataSection,
        ModelSection,
        OptimizerSection,
        Recipe,
        TrainSection,
    )

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        set_up(folder, "demo")
        recipe = Recipe(
            model=ModelSection(preset=preset),
            data=DataSection(path=str(folder / "data"), sequence_length=256),
            train=TrainSection(
                steps=steps,
                batch_tokens=8 * 256,
                micro_batch_size=4,
                precision=precision,  # type: ignore[arg-type]
                compile="off",
                threads=1,
                evaluate_every=0,
                checkpoint_every=10**6,
                log_every=1,
            ),
            optimizer=OptimizerSection(warmup_steps=0),
        )
        recipe.write(folder / "recipe.toml")
        for processes, kind in worlds:
            run = folder / f"{kind}{processes}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(processes), "-m", "mobilellm", "train"]
            command += [str(folder / "recipe.toml"), "--out", str(run), "--parallel.kind", kind]
            subprocess.run(
                [*command, *parallel],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            lines = (run / "metrics.jsonl").read_text().splitlines()
            metrics: list[dict[str, Any]] = [json.loads(line) for line in lines]
            speed = statistics.median(row["tokens_per_second"] for row in metrics[5:])
            one = rows[0]["tokens_per_second"] if rows else speed
            rows.append(
                {
                    "processes": processes,
                    "kind": kind,
                    "tokens_per_second": speed,
                    "ratio": speed / one,
                }
            )
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="5M", help="size of the model")
    parser.add_argument("--steps", type=int, default=25, help="steps of each")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    import torch

    from mobilellm.hardware.description import describe
    from mobilellm.model.precision import Precision

    precision = Precision.fast_on(torch.device("cpu")).value
    rows = measure(arguments.preset, arguments.steps, precision)
    for row in rows:
        print(
            f"{row['processes']} process(es), {row['kind']}: {row['tokens_per_second']:,.0f} "
            f"tokens/s, {row['ratio']:.2f}x"
        )
    if arguments.save:
        machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
        record = {
            "benchmark": "scaling",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "preset": arguments.preset,
            "precision": precision,
            "results": rows,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
