"""Weights of others, checked and put into a network.

    check_weights(named, "model.gguf")             # floats, all of them finite
    network = assemble(config, named, "model.gguf")

Every reader ends here: by then the tensors have their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import from_named, load_weights

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_NAMED = 20  # tensors that one message names


def check_weights(named: Mapping[str, Tensor], where: str) -> None:
    """`UserError` for weights that are no plain floats, or hold NaN or infinity, by name."""
    wrong = [
        f"{name} ({tensor.dtype})" for name, tensor in named.items() if tensor.dtype not in FLOATS
    ]
    if wrong:
        raise UserError(f"{where}: not floating point: {', '.join(wrong[:MAX_NAMED])}")
    # The sum is quick, and finite for most sound tensors; where it is not, every element is tried.
    bad = [
        name
        for name, tensor in named.items()
        if not torch.isfinite(tensor.sum(dtype=torch.float64)) and not torch.isfinite(tensor).all()
    ]
    if bad:
        raise UserError(
            f"{where}: NaN or infinite weights in {', '.join(bad[:MAX_NAMED])}",
            hint="the checkpoint is broken at its source",
        )


def assemble(config: ModelConfig, named: Mapping[str, Tensor], where: str) -> Network:
    """The network with these weights. Shapes are checked before memory is taken for it."""
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in named.items()}
    from_named(config, empty, where)
    network = Network(config, initialized=False)
    load_weights(network, named, where)
    return network
