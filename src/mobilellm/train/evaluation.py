"""What is measured in the loop: the held-out loss, that of each source, and zero-shot tasks.

All processes take part: they divide the held-out batches, or apply a sharded network together.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mobilellm.evaluate.perplexity import Score
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.train.heldout import document_border, held_out, total_loss
from mobilellm.train.inputs import Data
from mobilellm.train.recipe import Recipe
from mobilellm.train.sharded import full
from mobilellm.train.world import World

MIN_HELD_OUT_TOKENS = 2  # of a source: one to predict from and one to predict


class Evaluation:
    """The measurements of one run."""

    def __init__(
        self, network: Network, data: Data, recipe: Recipe, world: World, sharded: bool
    ) -> None:
        self.network, self.data, self.recipe = network, data, recipe
        self.world, self.sharded = world, sharded

    def held_out(self) -> Score:
        """Score of the held-out split, in windows of the training length."""
        with self.world.waiting():
            return held_out(
                self.network,
                self.data,
                sequence_length=self.recipe.data.sequence_length,
                precision=Precision(self.recipe.train.precision),
                world=self.world,
                sharded=self.sharded,
            )

    def sources(self) -> dict[str, float]:
        """Held-out loss of each source, where there are several, as metrics."""
        names = self.data.sources()
        if len(names) < 2:
            return {}
        found = {}
        with self.world.waiting():
            for name in names:
                stream = self.data.tokens("heldout", name)
                if len(stream) < MIN_HELD_OUT_TOKENS:
                    continue
                nats, counted = total_loss(
                    self.network,
                    stream,
                    document_border(self.data),
                    self.recipe.data.sequence_length,
                    Precision(self.recipe.train.precision),
                    self.world,
                    self.sharded,
                )
                found[f"held_out_loss/{name}"] = nats / max(1, counted)
        return found

    def tasks(self, step: int) -> dict[str, float]:
        """Zero-shot scores of the recipe's tasks as metrics, by rank 0 while the others wait."""
        from mobilellm.evaluate.tasks import score_tasks

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
        return copy
