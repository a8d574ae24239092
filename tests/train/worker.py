"""What test_world.py runs in each process that torchrun starts: worker.py SCENARIO RECIPE
FOLDER."""

import os
import signal
import sys
from pathlib import Path

import torch

from mobilellm.data.token_folder import TokenFolder
from mobilellm.distributed.sharded import full
from mobilellm.distributed.world import World
from mobilellm.recipe.recipe import Recipe
from mobilellm.train import start
from mobilellm.train.loop import Trainer
from mobilellm.train.rows import Watcher


class StopAt(Watcher):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, row: dict) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def gradients(recipe: Recipe, world: World) -> None:
    """Every parallelism has one process's gradients, with and without accumulation; kept back,
    they are this process's."""
    data = TokenFolder.open(Path(recipe.data.path))
    alone = Trainer(recipe, data, world=World(device=world.device))
    batch, _ = next(iter(alone.loader()))
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    expected = alone.step.forward_backward(inputs, targets)
    kinds = [("ddp", 0), ("fsdp", 0)] + ([("fsdp", 2)] if world.size == 4 else [])
    for kind, within in kinds:
        for micro in (1, 99):
            settings = recipe.replace("parallel", kind=kind, shard_group_size=within).replace(
                "train", micro_batch_size=micro
            )
            trainer = Trainer(settings, data, world=world)
            mine, _ = next(iter(trainer.loader()))
            rows = len(inputs) // world.size
            assert (
                mine.inputs.tolist() == inputs[world.rank * rows : (world.rank + 1) * rows].tolist()
            )
            loss = trainer.step.forward_backward(
                torch.from_numpy(mine.inputs), torch.from_numpy(mine.targets)
            )
            assert abs(loss - expected) < 1e-6 * expected, (kind, micro, loss, expected)
            for (name, p), q in zip(
                trainer.network.named_parameters(), alone.network.parameters(), strict=True
            ):
                gradient = full(p.grad)
                assert (gradient - q.grad).abs().max() <= 3e-6 * q.grad.abs().max() + 1e-9, (
                    kind,
                    micro,
                    name,
                )
    kept = Trainer(recipe, data, world=world)
    x, y = (torch.from_numpy(a)[:1] for a in (mine.inputs, mine.targets))
    with kept.step.parallel.accumulating():
        kept.step.parallel(x, y).backward()
    alone.network.zero_grad()
    (alone.network.loss(x, y, "sum") * world.size).backward()
    for p, q in zip(kept.network.parameters(), alone.network.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-6 * q.grad.abs().max(), (
            "gradients travelled while accumulating"
        )


def masked(recipe: Recipe, world: World) -> None:
    """Targets that do not count are left out of the mean over all processes, which hold
    different numbers of them."""
    data = TokenFolder.open(Path(recipe.data.path))
    alone = Trainer(recipe, data, world=World(device=world.device))
    batch, _ = next(iter(alone.loader()))
    inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets).clone()
    rows = len(inputs) // world.size
    targets[:rows, 5:] = -100  # rank 0 has few that count, and none in its first row
    targets[0] = -100
    mean = alone.network.loss(inputs, targets)
    mean.backward()
    for kind in ("ddp", "fsdp"):
        for micro in (1, 99):
            settings = recipe.replace("parallel", kind=kind).replace(
                "train", micro_batch_size=micro
            )
            trainer = Trainer(settings, data, world=world)
            trainer.step.masked = True
            mine = slice(world.rank * rows, (world.rank + 1) * rows)
            loss = trainer.step.forward_backward(inputs[mine], targets[mine])
            assert abs(loss - mean) < 1e-6 * mean, (kind, micro, loss, mean)
            pairs = zip(trainer.network.named_parameters(), alone.network.parameters(), strict=True)
            for (name, p), q in pairs:
                difference = (full(p.grad) - q.grad).abs().max()
                assert difference <= 3e-6 * q.grad.abs().max() + 1e-9, (kind, micro, name)


def main(scenario: str, recipe: Recipe, folder: Path) -> None:
    with World.join(timeout=60) as world:
        if scenario == "gradients":
            gradients(recipe, world)
        elif scenario == "masked":
            masked(recipe, world)
        elif scenario == "whole-and-stopped":
            for name in ("whole", "stopped", "stopped-here"):
                start.train(
                    folder / name,
                    recipe,
                    StopAt(10) if world.main and name != "whole" else None,
                    world,
                )
            start.resume(folder / "stopped-here", world=world)
        elif scenario == "go-on":
            start.resume(folder / "stopped", world=world, changes=recipe)
        else:
            raise ValueError(scenario)


if __name__ == "__main__":
    main(sys.argv[1], Recipe.read(Path(sys.argv[2])), Path(sys.argv[3]))
