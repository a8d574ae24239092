"""Weights of others, checked and put into a network.

    check_weights(named, "model.gguf")             # floats, all of them finite
    network = assemble(config, named, "model.gguf")

Every reader ends here: by then the tensors have their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mobilellm.budget import ask
from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network, RMSNorm
from mobilellm.model.rope import cos_sin, first_positions
from mobilellm.model.weights import check_named, load_weights, stacks

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CHECKED_AT_ONCE = 1 << 20  # numbers
MAX_NAMED = 20  # tensors that one message names


def check_weights(
    named: Mapping[str, Tensor], where: str, seen: Callable[[], object] = lambda: None
) -> None:
    """`UserError` for weights that are no plain floats, or hold NaN or infinity, by name; `seen` is
    called behind each tensor."""
    wrong = [
        f"{name} ({tensor.dtype})" for name, tensor in named.items() if tensor.dtype not in FLOATS
    ]
    if wrong:
        raise UserError(f"{where}: not floating point: {', '.join(wrong[:MAX_NAMED])}")
    # A sum is quick, and finite for most sound numbers; where it is not, every one is tried.
    bad = []
    for name, tensor in named.items():
        parts = tensor.flatten().split(CHECKED_AT_ONCE)
        if not all(_finite(part) for part in parts):
            bad.append(name)
        seen()
    if bad:
        raise UserError(
            f"{where}: NaN or infinite weights in {', '.join(bad[:MAX_NAMED])}",
            hint="the checkpoint is broken at its source",
        )


def _finite(numbers: Tensor) -> bool:
    # The sum in another type would make a copy, whose memory the process then keeps.
    return bool(torch.isfinite(numbers.sum()) or torch.isfinite(numbers).all())


def assemble(
    config: ModelConfig,
    named: Mapping[str, Tensor],
    where: str,
    *,
    halves: bool = False,
    copied: Callable[[], object] = lambda: None,
) -> Network:
    """The network with these weights, in float32. Shapes are checked before memory is taken for it.

    With `halves` the matrices that are stored in bf16 stay so; such a network has to be packed
    (quantize/packed.py) before it runs. `copied` is called behind each part of a parameter.
    """
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in named.items()}
    check_named(config, empty, where)
    network = _as_stored(config, named) if halves else Network(config, initialized=False)
    load_weights(network, named, where, copied)
    return network


def _as_stored(config: ModelConfig, named: Mapping[str, Tensor]) -> Network:
    """A network whose memory is not yet written to, with matrices in bf16 that are stored so."""
    parts = stacks(config)
    types = {
        ours: torch.bfloat16
        if all(named[name].ndim == 2 and named[name].dtype == torch.bfloat16 for name, _ in theirs)
        else torch.float32
        for ours, theirs in parts.items()
    }
    with torch.device("meta"):
        network = Network(config, initialized=False)
    sizes = {name: parameter.shape for name, parameter in network.named_parameters()}
    ask(sum(types[name].itemsize * shape.numel() for name, shape in sizes.items()), "its weights")
    for name, shape in sizes.items():
        weight = nn.Parameter(torch.empty(shape, dtype=types[name]))
        network.get_submodule(name.rpartition(".")[0]).weight = weight
    for module in network.modules():
        if isinstance(module, RMSNorm) and module.weight.is_meta:  # one without a gain
            module.weight = torch.ones(module.weight.shape)
    network.cos, network.sin = (t.unsqueeze(1) for t in cos_sin(config, first_positions(config)))
    return network
