"""What is measured in the loop: the held-out loss, that of each source, and zero-shot tasks.

All processes take part: they divide the held-out batches, or apply a sharded network together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mobilellm.data.dataset import Data
from mobilellm.data.token_folder import TokenFolder
from mobilellm.derived.reference import Reference, held_out_pairs
from mobilellm.distributed.sharded import full
from mobilellm.distributed.world import World
from mobilellm.evaluate.held_out import held_out, held_out_of_source
from mobilellm.evaluate.perplexity import ALONE, Score
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.quantize.training import fake_quantize
from mobilellm.recipe.recipe import Recipe


class Evaluation:
    """The measurements of one run."""

    def __init__(
        self,
        network: Network,
        data: Data,
        recipe: Recipe,
        world: World,
        sharded: bool,
        reference: Reference | None = None,
    ) -> None:
        """`reference` is that of a training on pairs of answers."""
        self.network, self.data, self.recipe = network, data, recipe
        self.world, self.sharded, self.reference = world, sharded, reference

    def held_out(self) -> Score:
        """Score of the held-out split, in windows of the training length."""
        with self.measuring() as options:
            return held_out(self.network, self.data, **options)

    def sources(self) -> dict[str, float]:
        """Held-out loss of each source, where there are several, as metrics."""
        names = self.data.sources()
        if len(names) < 2:
            return {}
        found = {}
        with self.measuring() as options:
            for name in names:
                loss = held_out_of_source(self.network, self.data, name, **options)
                if loss is not None:
                    found[f"held_out_loss/{name}"] = loss
        return found

    def preferences(self) -> dict[str, float]:
        """Loss, reward margin and accuracy on the held-out pairs, where there are such."""
        if self.reference is None or not isinstance(self.data, TokenFolder):
            return {}
        with self.measuring() as options:
            return held_out_pairs(
                self.network,
                self.data,
                self.reference,
                self.recipe.objective.beta,
                options["precision"],
                options["processes"],
            )

    @contextlib.contextmanager
    def measuring(self) -> Iterator[dict[str, Any]]:
        """How held-out text is measured here; the network is as it was at the end of the block.

        Processes divide the batches, but for a sharded network, which all must apply together. It
        runs uncompiled, since the shapes differ from those of training.
        """
        with self.world.waiting(), torch.compiler.set_stance("force_eager"):
            yield {
                "sequence_length": self.recipe.data.sequence_length,
                "precision": Precision(self.recipe.train.precision),
                "processes": ALONE if self.sharded else self.world,
            }
            if self.sharded:  # FSDP leaves the embedding gathered for a backward pass
                self.network.reshard()  # type: ignore[operator]

    def tasks(self, step: int) -> dict[str, float]:
        """Zero-shot scores of the recipe's tasks as metrics, by rank 0 while the others wait."""
        from mobilellm.tasks.task_scores import score_tasks

        section = self.recipe.eval
        found: dict[str, float] = {}
        with self.world.waiting():
            network = self.whole_network()
            if self.world.main:
                scores = score_tasks(
                    network,
                    self.data.tokenizer(),
                    list(section.tasks),
                    Path(section.data) if section.data else None,
                    limit=section.limit or None,
                )
                for task, score in scores.items():
                    for key in ("acc", "acc_norm"):
                        if score.get(key) is not None:
                            found[f"{task}/{key}"] = score[key]
            self.world.after_main(f"tasks-{step}", done=self.world.main)
        return found

    def whole_network(self) -> Network:
        """The network itself, or a copy gathered from all processes where it is sharded."""
        if not self.sharded:
            return self.network
        copy = Network(self.network.config, initialized=False).to(self.world.device)
        with torch.no_grad():
            for mine, gathered in zip(copy.parameters(), self.network.parameters(), strict=True):
                mine.copy_(full(gathered.detach()))
        if self.recipe.quantize.scheme:
            fake_quantize(copy, self.recipe.quantize.scheme, self.recipe.quantize.embedding)
        return copy
