"""Whether training on a GPU computes what the CPU does: losses, gradients, and a few steps.

    python benchmarks/gpu_check.py --save benchmarks/results/gpu_check.json

The same network and tokens on both, in float32 and bf16, with targets that do not count, compiled
and not: relative errors of losses and gradients against float64 on the CPU. Once for the next
token, from a teacher, with several documents a row (FlexAttention), with blocks applied twice of
both kinds, and with norms of queries and keys.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from mobilellm.distributed.parallel import Parallel
from mobilellm.distributed.world import World
from mobilellm.hardware.description import describe
from mobilellm.hardware.probes import pick_device
from mobilellm.model.config import ModelConfig
from mobilellm.model.loss import NextToken
from mobilellm.model.network import Network
from mobilellm.objectives.distillation import Distillation
from mobilellm.recipe.recipe import Recipe, TrainSection

BOUNDS = {"fp32": 1e-3, "bf16": 3e-2}  # relative errors of gradients


CASES: dict[str, dict[str, Any]] = {
    "next token": {},
    "distillation": {},
    "documents": {},
    "layers twice": {"layer_repeats": 2},
    "layers twice, shared keys": {"layer_repeats": 2, "shared_kv": "first"},
    "normed queries and keys": {"qk_norm": True},
}
"""What differs in the network's configuration."""


def gradients(
    device: torch.device, dtype: torch.dtype, precision: str, compile: str, case: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a fixed batch, and every gradient, in float64 on the CPU."""
    torch.manual_seed(0)
    config = ModelConfig.preset("5M", vocab_size=4096, **CASES[case])
    network, other = Network(config), Network(config)
    network.to(device, dtype)
    other.to(device, dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4096, (4, 513), generator=generator)
    targets = ids[:, 1:].clone()
    targets[1, 100:300] = -100
    recipe = Recipe(train=TrainSection(precision=precision, compile=compile))  # type: ignore[arg-type]
    objective = Distillation(other, 0.5, 2.0) if case == "distillation" else NextToken(1e-4)
    documents = None
    if case == "documents":
        starts = torch.rand(4, 512, generator=generator) < 0.02
        documents = starts.cumsum(1).to(device)
    parallel = Parallel(network, recipe, World(device=device), objective)
    loss = parallel(ids[:, :-1].to(device), targets.to(device), documents) / targets.numel()
    loss.backward()
    found = {n: p.grad.double().cpu() for n, p in network.named_parameters() if p.grad is not None}
    return loss.item(), found


def main() -> None:
    """Compare, print, save; ends with an error when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    device, cpu = pick_device(), torch.device("cpu")
    rows: list[dict[str, Any]] = []
    for case in CASES:
        exact, expected = gradients(cpu, torch.float64, "fp32", "off", case)
        for precision in ("fp32", "bf16"):
            for compile in ("off", "block"):
                torch._dynamo.reset()
                loss, found = gradients(device, torch.float32, precision, compile, case)
                errors = {
                    n: float((found[n] - g).norm() / g.norm().clamp_min(1e-12))
                    for n, g in expected.items()
                }
                worst = max(errors.values())
                broken = [n for n, error in errors.items() if error >= BOUNDS[precision]]
                row = {
                    "case": case,
                    "precision": precision,
                    "compile": compile,
                    "loss_error": abs(loss - exact) / abs(exact),
                    "worst_gradient_error": worst,
                    "holds": not broken,
                    "broken": broken,
                }
                rows.append(row)
                print(row, flush=True)
    record = {
        "benchmark": "gpu_check",
        "date": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in describe(device).items() if k != "command"},
        "results": rows,
    }
    if arguments.save:
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")
    if not all(row["holds"] for row in rows):
        raise SystemExit("a gradient is further from float64 than its precision allows")


if __name__ == "__main__":
    main()
