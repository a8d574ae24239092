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
from pathlib import Path
from typing import Any

from trainer_vs_hf import set_up


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
    from mobilellm.recipe.recipe import (
        DataSection,
        ModelSection,
        OptimizerSection,
        Recipe,
        TrainSection,
    )

    precision = Precision.fast_on(torch.device("cpu")).value
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        set_up(folder, "demo")
        recipe = Recipe(
            model=ModelSection(preset=arguments.preset),
            data=DataSection(path=str(folder / "data"), sequence_length=256),
            train=TrainSection(
                steps=arguments.steps,
                batch_tokens=8 * 256,
                micro_batch_size=4,
                precision=precision,
                compile="off",
                threads=1,  # type: ignore[arg-type]
                evaluate_every=0,
                checkpoint_every=10**6,
                log_every=1,
            ),
            optimizer=OptimizerSection(warmup_steps=0),
        )
        recipe.write(folder / "recipe.toml")
        for processes, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
            run = folder / f"{kind}{processes}"
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(processes),
                    "-m",
                    "mobilellm",
                    "train",
                    folder / "recipe.toml",
                    "--out",
                    run,
                    "--parallel.kind",
                    kind,
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=True,
            )
            metrics: list[dict[str, Any]] = [
                json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
            ]
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
            print(
                f"{processes} process(es), {kind}: {speed:,.0f} tokens/s, {rows[-1]['ratio']:.2f}x",
                flush=True,
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
