"""Log-likelihoods of many continuations, fast: an item's beginning is computed once for all its
choices.

    engine = Engine(NetworkBackend(network))
    results = engine.score(requests, keys)     # a Result for each request, in order

A batch is one row without padding, in which every beginning that requests share stands once:
positions and attention masks make each token see those that lead to it (packing.py). Choices of
one token add none and are read off the last shared position. Items are sorted by their tokens, so
that those which begin alike meet in a batch; logits are computed at scored positions alone, once
for all requests that score there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.model.linear import linear, scoring_products
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.tasks.packing import pack
from mobilellm.tasks.requests import Item, Request, Result, group

LOGITS_AT_ONCE = 1 << 21  # numbers, 8 MiB: the logits that exist at a time on a CPU
LOGITS_AT_ONCE_ON_ACCELERATOR = 1 << 26
PRODUCT_ROWS = 2048  # of the products by which the library is chosen: a batch
Store = Callable[[list[Request], list[Result]], None]


class Backend(Protocol):
    """A model that scores batches of items."""

    @property
    def max_length(self) -> int:
        """The most tokens it reads."""
        ...

    def order(self, item: Item) -> tuple[int, ...]:
        """What items are sorted by, so that those of one batch are alike and the costliest come
        first."""
        ...

    def cost(self, item: Item) -> int:
        """Tokens it takes."""
        ...

    @property
    def pads(self) -> bool:
        """Whether all items of a batch cost what the costliest does."""
        ...

    def score(self, items: Sequence[Item]) -> list[list[Result]]:
        """Results of each item's requests."""
        ...


@dataclass
class NetworkBackend:
    """Our own network."""

    network: Network
    precision: Precision = Precision.FP32
    pads: ClassVar[bool] = False

    @property
    def max_length(self) -> int:
        """The network's context."""
        return self.network.config.max_position_embeddings

    def order(self, item: Item) -> tuple[int, ...]:
        """Alike beginnings together."""
        return item.requests[0].inputs

    def cost(self, item: Item) -> int:
        """Its length."""
        return item.length

    @torch.inference_mode()
    def score(self, items: Sequence[Item]) -> list[list[Result]]:
        """As `Backend` says."""
        device = self.network.norm.weight.device
        row = pack(items, device)
        targets = [request.targets for item in items for request in item.requests]
        with self.precision.autocast(device), self._products(device):
            hidden = self.network.hidden(
                torch.tensor(row.tokens, device=device)[None],
                packed=(torch.tensor(row.depths, device=device), row.spans),
                rows=torch.tensor(list(row.read), device=device),
            )[0]  # (places where something is predicted, C)
            values, first_choice = token_loglikelihoods(
                hidden,
                self.network.output_weight,
                torch.tensor(list(itertools.chain(*targets)), device=device),
                torch.tensor(list(itertools.chain(*row.scored)), device=device),
            )
        return collect(items, values, first_choice)

    def _products(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """What multiplies float32 on a CPU."""
        if self.precision is not Precision.FP32 or device.type != "cpu":
            return contextlib.nullcontext()
        return scoring_products(self.network.config, PRODUCT_ROWS)


def token_loglikelihoods(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """log P(target) in nats and whether it is the likeliest token, for hidden (N, C), weight (V,
    C), targets (M) and the row of hidden that predicts each (M).

    A part of the vocabulary at a time, so that its logits stay in the cache; the softmax's sum
    is carried on with its maximum.
    """
    best = hidden.new_full((len(hidden),), -math.inf, dtype=torch.float32)
    place = torch.full((len(hidden),), -1, device=hidden.device)
    total = torch.zeros_like(best)
    found = torch.zeros(len(targets), device=hidden.device)
    at_once = LOGITS_AT_ONCE if hidden.device.type == "cpu" else LOGITS_AT_ONCE_ON_ACCELERATOR
    start = 0
    for part in weight.split(max(1024, at_once // max(1, len(hidden)))):
        logits = linear(hidden, part).float()
        here = targets - start
        inside = (here >= 0) & (here < len(part))
        found = torch.where(inside, logits[rows, here.clamp(0, len(part) - 1)], found)
        highest, at = logits.max(dim=1)
        place = torch.where(highest > best, at + start, place)
        before, best = best, torch.maximum(best, highest)
        total = total * (before - best).exp_() + logits.sub_(best[:, None]).exp_().sum(dim=1)
        start += len(part)
    return found - (best + total.log_())[rows], place[rows] == targets


def from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits (N, V)."""
    logits = logits.float()
    found = logits.gather(1, targets[:, None])[:, 0]
    best, place = logits.max(dim=1)
    # log-sum-exp in place: the logits are needed no more
    total = logits.sub_(best[:, None]).exp_().sum(dim=1).log_() + best
    return found - total, place == targets


def collect(items: Sequence[Item], values: Tensor, greedy: Tensor) -> list[list[Result]]:
    """Sums over each request's tokens, which follow one another in `values`."""
    numbers, flags = values.double().tolist(), greedy.tolist()
    found, start = [], 0
    for item in items:
        results = []
        for request in item.requests:
            end = start + request.scored
            results.append(Result(math.fsum(numbers[start:end]), all(flags[start:end])))
            start = end
        found.append(results)
    return found


class Engine:
    """Schedules requests on a backend. `batch_tokens` is the budget of one batch; it halves when
    memory runs out."""

    def __init__(self, backend: Backend, batch_tokens: int = 2048) -> None:
        self.backend, self.batch_tokens = backend, batch_tokens

    def score(
        self,
        requests: Sequence[Request],
        keys: Sequence[Hashable],
        store: Store | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Results in the order of the requests. Those with equal `keys` belong to one item.

        `store` receives results batch by batch as they come; `progress(done, total)` counts items.
        """
        items = sorted(group(requests, keys), key=self.backend.order)
        found: dict[Request, Result] = {}
        done = 0
        for batch, results in self.batches(items):
            members = [request for item in batch for request in item.requests]
            flat = [result for row in results for result in row]
            found.update(zip(members, flat, strict=True))
            if store:
                store(members, flat)
            done += len(batch)
            if progress:
                progress(done, len(items))
        return [found[request] for request in requests]

    def batches(self, items: list[Item]) -> Iterator[tuple[list[Item], list[list[Result]]]]:
        """Batches with their results. The longest come first, so that memory runs out at once or
        not at all."""
        start = 0
        while start < len(items):
            batch = items[start : start + self.fitting(items, start)]
            try:
                results = self.backend.score(batch)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise UserError(
                        f"out of memory on a single item of {batch[0].length} tokens",
                        hint="free memory, or take a smaller model",
                    ) from error
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                costs = list(map(self.backend.cost, batch))
                self.batch_tokens = (
                    max(costs) * (len(batch) // 2) if self.backend.pads else sum(costs) // 2
                )
                continue
            yield batch, results
            start += len(batch)

    def fitting(self, items: list[Item], start: int) -> int:
        """How many items from `start` on fit the budget; one in any case."""
        widest, total = 0, 0
        for count, item in enumerate(itertools.islice(items, start, None), 1):
            cost = self.backend.cost(item)
            widest, total = max(widest, cost), total + cost
            if count > 1 and (widest * count if self.backend.pads else total) > self.batch_tokens:
                return count - 1
        return len(items) - start


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; torch says so in words on the CPU."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)
