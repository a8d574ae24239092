"""Layer sharing across formats: unrolled for tools that know no repeats, and folded again.

plain(network)         # a network that every tool knows, or UserError
unrolled(network)      # 30 blocks applied twice -> 60 blocks
folded(network)        # and back, where neighboring blocks are equal
"""

from __future__ import annotations

import dataclasses

import torch

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network


def plain(network: Network, approximate: bool = False) -> Network:
    """The network as a plain Llama: shared layers unrolled.

    `UserError` when later applications reuse K and V, which no plain Llama does; `approximate`
    lets each compute its own instead, which is another function.
    """
    config = network.config
    if config.layer_repeats == 1:
        return network
    if config.shared_kv == "first" and not approximate:
        raise UserError(
            'layer sharing with shared_kv = "first" has no equal among plain Llama networks',
            hint="keep it with --to mobilellm, or add --approximate to write it as if each "
            "application had its own K and V",
        )
    if config.shared_kv == "first":
        own = Network(dataclasses.replace(config, shared_kv="own"), initialized=False)
        own.load_state_dict(network.state_dict())
        network = own
    return unrolled(network)


def unrolled(network: Network) -> Network:
    """The same function with every application a block of its own; the weights are copied."""
    plain = Network(unrolled_config(network.config), initialized=False)
    with torch.no_grad():
        _copy_outside(network, plain)
        for number, layer in zip(network.config.application_order, plain.layers, strict=True):
            layer.load_state_dict(network.layers[number].state_dict())
    return plain


def unrolled_config(config: ModelConfig) -> ModelConfig:
    """The configuration of `unrolled`."""
    kinds = config.layer_types
    return dataclasses.replace(
        config,
        num_hidden_layers=config.num_hidden_layers * config.layer_repeats,
        layer_repeats=1,
        shared_kv="own",
        layer_order="immediate",
        layer_types=None if kinds is None else [kinds[i] for i in config.application_order],
    )


def folded(network: Network) -> Network:
    """Equal neighboring blocks as repeats of one, with as many repeats as every group allows.

    Returns `network` itself where nothing can be folded.
    """
    config = network.config
    count, specs, kinds = config.num_hidden_layers, config.attention_specs, config.layer_types
    if config.layer_repeats > 1:
        return network
    for repeats in range(count, 1, -1):
        if count % repeats == 0 and all(
            _equal(network.layers[i], network.layers[i - i % repeats])
            and specs[i] == specs[i - i % repeats]
            for i in range(count)
            if i % repeats
        ):
            folded = Network(
                dataclasses.replace(
                    config,
                    num_hidden_layers=count // repeats,
                    layer_repeats=repeats,
                    shared_kv="own",
                    layer_types=None if kinds is None else kinds[::repeats],
                ),
                initialized=False,
            )
            with torch.no_grad():
                _copy_outside(network, folded)
                for i, layer in enumerate(folded.layers):
                    layer.load_state_dict(network.layers[i * repeats].state_dict())
            return folded
    return network


def _copy_outside(source: Network, target: Network) -> None:
    target.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    target.norm.load_state_dict(source.norm.state_dict())
    if source.lm_head is not None and target.lm_head is not None:
        target.lm_head.load_state_dict(source.lm_head.state_dict())


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
