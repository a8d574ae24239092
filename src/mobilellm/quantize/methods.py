"""A whole network put onto the grid.

    quantized = quantized_network(network, scheme="int4", method="search")
    quantized.weights["layers.0.mlp.down_proj.weight"].integers

The matrices of the blocks are put onto the scheme's grid. The embedding and the output layer get 8
bits, a scale a row, with every scheme: at 4 bits they cost SmolLM2-135M more than all its blocks do
(docs/quantization.md). Norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mobilellm.errors import UserError, unknown_name
from mobilellm.model.network import Network
from mobilellm.quantize.gptq import check_gptq, gptq_blocks
from mobilellm.quantize.grid import GROUP, GridWeight, groups_of
from mobilellm.quantize.quantized import Quantized
from mobilellm.quantize.rounding import ROUNDINGS
from mobilellm.quantize.schemes import EMBEDDINGS, METHODS, SCHEMES
from mobilellm.version import __version__

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def quantized_network(
    network: Network,
    scheme: str = "int4",
    method: str = "search",
    embedding: str = "int8",
    calibration: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Put the network's matrices onto the grid, and say where they lie.

    **The network's own parameters are changed**: afterwards they are what integers and scales
    stand for, exactly. A tied embedding is one matrix, and a block that is applied several times
    one block. `embedding` "float" leaves the embedding and the output layer as they are. Method
    "gptq" needs `calibration`, token ids (N, T), and gives the vocabulary's matrices to "search";
    `progress(done, total)` counts its blocks.

    `UserError` for a width that the scheme's groups do not divide, and as `check_gptq`, before
    anything is changed.
    """
    if scheme not in SCHEMES:
        raise unknown_name("scheme", scheme, SCHEMES)
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if embedding not in EMBEDDINGS:
        raise unknown_name("embedding", embedding, EMBEDDINGS)
    bits = {
        name: 8 if name in VOCABULARY else SCHEMES[scheme].bits
        for name, parameter in network.named_parameters()
        if parameter.ndim == 2 and (embedding == "int8" or name not in VOCABULARY)
    }
    check_widths(network, bits)
    if method == "gptq" and calibration is None:
        raise UserError(
            "method gptq chooses integers by a text", hint="give a calibration text, or use search"
        )
    if method == "gptq" and calibration is not None:
        check_gptq(network, calibration)
    rounding = ROUNDINGS["search" if method == "gptq" else method]
    weights: dict[str, GridWeight] = {}
    with torch.no_grad():
        embedded = None
        if method == "gptq" and calibration is not None:
            embedded = network.embed_tokens(calibration)
        for name, parameter in network.named_parameters():
            if name in bits and (method != "gptq" or name in VOCABULARY):
                weights[name] = rounding(parameter, bits[name])
                parameter.copy_(weights[name].dequantized())
    if calibration is not None and embedded is not None:
        weights |= gptq_blocks(network, bits, calibration, embedded, progress)
    facts = {"embedding": embedding, "made_by": f"mobilellm {__version__}"}
    return Quantized(scheme=scheme, method=method, weights=weights, facts=facts)


def quantized_as_trained(network: Network, origin: dict[str, Any]) -> Quantized | None:
    """Put a network that was trained for the grid onto it, as its products saw it in training.

    `origin` is what its checkpoint says of itself (mobilellm.json); None, and nothing is changed,
    where that names no scheme.
    """
    trained = origin.get("trained_for")
    if not isinstance(trained, dict):
        return None
    scheme, method, embedding = (str(trained.get(key)) for key in ("scheme", "method", "embedding"))
    return quantized_network(network, scheme, method, embedding)


def check_widths(network: Network, bits: dict[str, int]) -> None:
    """`UserError` for a matrix whose columns the groups of its grid do not divide."""
    for name, parameter in network.named_parameters():
        if name in bits and not groups_of(parameter.shape[1], bits[name]):
            fitting = " or ".join(key for key, scheme in SCHEMES.items() if scheme.bits == 8)
            raise UserError(
                f"{name}: its {parameter.shape[1]} columns do not divide into groups of {GROUP}",
                hint=f"use a scheme with a scale a row: {fitting}",
            )
