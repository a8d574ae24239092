"""Items of a batch as one row of tokens, in which every beginning that requests share stands once.

    row = pack(items, device)         # tokens, their positions, spans for attention
    hidden = network.hidden(tokens, packed=(positions, row.spans), rows=places)

A batch is a tree: items whose tokens begin alike (two questions on one passage) are stems with
spans behind them, and the requests of one item (its choices) are a tree of single tokens within its
span, whose mask lets each token see those that lead to it. What is still computed twice are
beginnings too short to be worth a stem (`pays`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mobilellm.model.attention_mask import Span
from mobilellm.tasks.requests import Item, common

STEM = 4
"""What a stem takes beside its tokens, in tokens of a 125M model: a call of attention in each block
(docs/log.md)."""


def pays(items: int, tokens: int) -> bool:
    """Whether so many tokens that so many items share are to be a stem. An item behind it takes
    what less than a token does: its keys and values are copied next to those of the stem."""
    return (items - 1) * tokens >= items + STEM


@dataclass
class Row:
    """A batch laid out. `pack` makes it."""

    device: torch.device
    """Where the spans' masks lie."""
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """The position of each token within its own text."""
    spans: list[Span] = field(default_factory=list)
    read: dict[int, int] = field(default_factory=dict)
    """Place in the row where something is predicted -> its number among them."""
    scored: list[list[int]] = field(default_factory=list)
    """Of each request of each item, for each of its scored tokens the number of the place that
    predicts it."""

    def span(self, start: int, seen: np.ndarray | None, path: Sequence[int]) -> None:
        """End a span that began at `start`, behind the places of `path`. `seen` is its own part of
        the mask, causal without one."""
        end = len(self.tokens)
        before = ranges(path)
        if before:
            own = np.tri(end - start, dtype=bool) if seen is None else seen
            seen = np.hstack([np.ones((end - start, len(path)), dtype=bool), own])
        mask = None if seen is None else torch.from_numpy(seen).to(self.device)
        self.spans.append(Span(start, end, mask, before))

    def stem(self, tokens: Sequence[int], path: Sequence[int]) -> list[int]:
        """Lay down tokens that items share, behind `path`; the path with them."""
        start = len(self.tokens)
        self.tokens += tokens
        self.depths += range(len(path), len(path) + len(tokens))
        self.span(start, None, path)
        return [*path, *range(start, len(self.tokens))]

    def item(self, item: Item, path: Sequence[int]) -> list[list[int]]:
        """Lay down what an item's requests read behind `path`; for each scored token of each
        request the number of the place that predicts it."""
        start, depth = len(self.tokens), len(path)
        children: dict[tuple[int, int], int] = {}  # (place before it, token) -> place
        parents: list[int] = []
        scored = []
        for request in item.requests:
            inputs, at = request.inputs, list(path)
            last = path[-1] if path else -1
            for position, token in enumerate(inputs[depth:], depth):
                place = children.get((last, token))
                if place is None:
                    place = children[last, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.depths.append(position)
                    parents.append(last)
                at.append(place)
                last = place
            scored.append(
                [self.read.setdefault(place, len(self.read)) for place in at[-request.scored :]]
            )
        if parents:
            self.span(start, tree_mask(parents, start), path)
        return scored


def pack(items: Sequence[Item], device: torch.device) -> Row:
    """The row of a batch."""
    row = Row(device)
    beginnings = [item.requests[0].inputs[: item.shared] for item in items]
    found: dict[int, list[list[int]]] = {}
    lay(row, items, beginnings, sorted(range(len(items)), key=beginnings.__getitem__), [], 0, found)
    row.scored = [scored for i in range(len(items)) for scored in found[i]]
    return row


def lay(
    row: Row,
    items: Sequence[Item],
    beginnings: Sequence[tuple[int, ...]],
    order: Sequence[int],
    path: list[int],
    shared: int,
    found: dict[int, list[list[int]]],
) -> None:
    """Lay down items, in the order of their beginnings, that have the first `shared` tokens in
    common, of which those at `path` are laid. `found` gets what `Row.item` gives for each."""
    start = 0
    for end in range(1, len(order) + 1):
        # Neighbours without a further token in common end a group; its first and last share what
        # all of it do.
        if end < len(order) and (
            common([beginnings[order[end - 1]], beginnings[order[end]]]) > shared
        ):
            continue
        group, start = order[start:end], end
        if len(group) == 1:
            found[group[0]] = row.item(items[group[0]], path)
            continue
        further, stem = common([beginnings[group[0]], beginnings[group[-1]]]), path
        if pays(len(group), further - len(path)):
            stem = row.stem(beginnings[group[0]][len(path) : further], path)
        lay(row, items, beginnings, group, stem, further, found)


def tree_mask(parents: Sequence[int], start: int) -> np.ndarray | None:
    """Which of a tree's tokens each of them sees, bool (n, n): those that lead to it. None where
    that is plain causality. `parents` are places in the row, the tree's own from `start` on."""
    if all(parent == start + i - 1 for i, parent in enumerate(parents) if i):
        return None
    seen = np.eye(len(parents), dtype=bool)
    for i, parent in enumerate(parents):
        if parent >= start:
            seen[i] |= seen[parent - start]
    return seen


def ranges(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending places as ranges (first, last + 1)."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return tuple(found)
