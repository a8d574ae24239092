"""The log-probabilities that a reference gives to the answers of pairs, computed once.

    reference = Reference.of(network, data, Precision.FP32)
    stream.beside = Answers(reference.tables["train"])     # a batch then has those of its rows

They lie beside the data, in DATA.reference-NAME, where NAME stands for the reference's weights, the
data and the precision: the same run again, a resumed one, and one with another beta find them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mobilellm.data.loader import Samples
from mobilellm.data.manifest import SPLITS
from mobilellm.data.token_folder import TokenFolder
from mobilellm.derived.parts import ArrayFile, Folder, digest_of, make, network_sha256
from mobilellm.evaluate.perplexity import ALONE, Processes
from mobilellm.files import cache_folder, locked
from mobilellm.model.loss import linear_cross_entropy
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.objectives.preference import (
    ACCURACY,
    MARGIN,
    answer_log_probabilities,
    margins,
)

KIND = "log-probabilities of a reference"
PART_ROWS = 256
BATCH_TOKENS = 8192
FLOATS = np.dtype("<f4")


class Answers:
    """The table of a split, read beside its stream."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        """`table` (rows, D) has a row's answers, 0 after its last one."""
        self.table = table
        self.rows = ((table.shape[1:], np.dtype(np.float32)),)

    def read(self, sample: int) -> tuple[NDArray[Any], ...]:
        """The answers of a row."""
        return (self.table[sample],)


class Reference:
    """The log-probabilities of both splits of a folder of pairs."""

    def __init__(self, folder: Folder, data: TokenFolder) -> None:
        width = _documents_per_row(data)
        self.tables = {
            split: np.concatenate(
                [folder.array(file.name) for _, file in _parts(data, split)]
            ).reshape(-1, width)
            for split in SPLITS
        }
        """A split's table, (rows, D)."""

    @classmethod
    def of(
        cls,
        reference: Network,
        data: TokenFolder,
        precision: Precision,
        say: Callable[[str], None] = lambda _: None,
    ) -> Reference:
        """Those kept beside the data, or computed now, by `reference` on its device."""
        facts = {
            "kind": KIND,
            "model": network_sha256(reference),
            "tokenizer": data.tokenizer().sha256,
            "data": data.fingerprint,
            "precision": precision.value,
        }
        path = place(data.path, facts)
        with locked(path.with_name(f".{path.name}.lock"), path):  # others wait for the first one
            if not path.exists():
                rows = sum(_samples(data, split).count for split in SPLITS)
                say(f"log-probabilities of the reference for {rows:,} rows go into {path}")
                compute_reference(path, facts, reference, data, precision)
        folder = Folder.open(path)
        folder.check(facts, f"remove {path}; it is made again")
        return cls(folder, data)


def place(data: Path, facts: dict[str, Any]) -> Path:
    """Where the log-probabilities of these facts lie: beside the data, or in the user's cache where
    one may not write there."""
    name = f"{data.name}.reference-{digest_of(facts)[:12]}"
    return (data.parent if os.access(data.parent, os.W_OK) else cache_folder()) / name


def compute_reference(
    out: Path, facts: dict[str, Any], network: Network, data: TokenFolder, precision: Precision
) -> None:
    """Make the folder `out`, part by part."""
    parts = [(split, rows, file) for split in SPLITS for rows, file in _parts(data, split)]

    def compute(number: int) -> list[NDArray[Any]]:
        split, rows, _ = parts[number]
        return [_log_probabilities(network, data, split, rows, precision)]

    make(out, facts, [(file,) for _, _, file in parts], compute)


def _documents_per_row(data: TokenFolder) -> int:
    """Documents in the fullest row of a folder of pairs."""
    assert data.preferences is not None
    return int(data.preferences["documents_per_row"])


def _parts(data: TokenFolder, split: str) -> Iterator[tuple[range, ArrayFile]]:
    """The rows of each part of a split's table, and its file."""
    count, width = _samples(data, split).count, _documents_per_row(data)
    for number, start in enumerate(range(0, count, PART_ROWS)):
        rows = range(start, min(start + PART_ROWS, count))
        yield rows, ArrayFile(f"{split}-{number:05d}.npy", FLOATS, len(rows) * width)


def _samples(data: TokenFolder, split: str) -> Samples:
    return Samples(data.tokens(split), data.row - 1)


def _log_probabilities(
    network: Network, data: TokenFolder, split: str, rows: range, precision: Precision
) -> NDArray[np.float32]:
    """Of the answers in some rows, (rows, D)."""
    found = [a.cpu().numpy() for _, a, _ in _answers(network, data, split, rows, precision)]
    return np.concatenate(found)


def _answers(
    network: Network, data: TokenFolder, split: str, rows: range, precision: Precision
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """The numbers of some rows, a few at a time, with the log-probabilities of their answers, (n,
    D), and their documents, (n, T)."""
    width, device = _documents_per_row(data), next(network.parameters()).device
    samples = _samples(data, split)
    size = max(1, BATCH_TOKENS // samples.length)
    with torch.no_grad():
        for start in range(rows.start, rows.stop, size):
            some = range(start, min(start + size, rows.stop))
            batch = samples.gather(samples.places(np.array(some)), documents=True)
            assert batch.documents is not None
            inputs, targets, documents = (
                torch.from_numpy(a).to(device)
                for a in (batch.inputs, batch.targets, batch.documents)
            )
            with precision.autocast(device):
                hidden = network.hidden(inputs, documents=documents).flatten(0, 1)
                nats = linear_cross_entropy(
                    hidden, network.output_weight, targets.flatten(), "none"
                )
            yield some, answer_log_probabilities(nats, targets, documents, width), documents


def held_out_pairs(
    network: Network,
    data: TokenFolder,
    reference: Reference,
    beta: float,
    precision: Precision = Precision.FP32,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Loss, reward margin and accuracy on the held-out pairs: means over pairs, as metrics.

    `processes` divide the rows among them."""
    table = torch.from_numpy(reference.tables["held_out"])
    share = -(-len(table) // processes.size)
    mine = range(
        min(len(table), processes.rank * share), min(len(table), (processes.rank + 1) * share)
    )
    device = next(network.parameters()).device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for rows, answers, documents in _answers(network, data, "held_out", mine, precision):
        wanted = table[rows.start : rows.stop].to(device)
        margin, there = margins(beta, answers, wanted, documents)
        loss = F.softplus(-margin) * there
        right = (margin > 0) & there
        found = (loss.sum(), (margin * there).sum(), right.sum(), there.sum())
        sums += torch.stack([value.double() for value in found])
    *totals, pairs = processes.sum_(sums).tolist()
    names = ("held_out_preference_loss", f"held_out_{MARGIN}", f"held_out_{ACCURACY}")
    return {name: total / pairs for name, total in zip(names, totals, strict=True)}
