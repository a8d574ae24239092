"""Held-out loss during the training, of all text and of each source, by all processes together."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobilellm.evaluate.perplexity import Score, windows
from mobilellm.model.loss import IGNORED
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.train.world import World

BATCH_TOKENS = 8192


def document_border(data: Any) -> int | None:
    """The token put before held-out text: the end of the document before it, where the data have
    one after each."""
    return data.eos_id if getattr(data, "eos", True) else None


def held_out(
    network: Network,
    data: Any,
    *,
    sequence_length: int,
    precision: Precision,
    world: World,
    sharded: bool,
) -> Score:
    """Score of the held-out split in windows of `sequence_length`, each token once."""
    stream = data.tokens("heldout")
    nats, counted = total_loss(
        network, stream, document_border(data), sequence_length, precision, world, sharded
    )
    size, mean = data.text_bytes("heldout"), nats / max(1, counted)
    return Score(
        loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / max(1, size),
        tokens=counted,
        bytes=size,
    )


def total_loss(
    network: Network,
    stream: Any,
    prefix: int | None,
    sequence_length: int,
    precision: Precision,
    world: World,
    sharded: bool,
) -> tuple[float, int]:
    """Nats and tokens of a stream. Processes divide the batches, but for a sharded network, which
    all must apply together."""
    device = next(network.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    rank, size = (0, 1) if sharded else (world.rank, world.size)
    # no_grad, since FSDP gathers weights that are trained on again; uncompiled, since the shapes
    # differ from training's.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for number, (inputs, targets) in enumerate(
            windows(stream, sequence_length, BATCH_TOKENS, prefix, sequence_length)
        ):
            if number % size != rank:
                continue
            with precision.autocast(device):
                loss = network.loss(
                    torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), "sum"
                )
            sums += torch.tensor(
                [loss.item(), float((targets != IGNORED).sum())], dtype=torch.float64, device=device
            )
    if sharded:
        network.reshard()  # type: ignore[operator]  # FSDP leaves the embedding gathered, for a backward pass that does not come
    nats, counted = (sums if sharded else world.sum_(sums)).tolist()
    return nats, int(counted)
