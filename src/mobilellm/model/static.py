"""The network as exporters trace it: a plain forward over the same weights, with a fixed cache.

`Network` serves training, packed evaluation and generation at once; a tracer needs the opposite of
that. Here positions are a tensor, the cache is tensors that go in and come out, and nothing
branches on data: there are no documents, packed rows or wanted rows. A prompt, a part of one and a
single token go through the same method. Rotary tables and cache are only as long as the chosen
context. Parameters are the network's own, not copies.

    static = StaticNetwork(network, context=1024)
    cache = static.empty_cache()                            # (2, kv_slots, B, K, context, D)
    positions = torch.arange(len(prompt))
    logits, cache = static(torch.tensor([prompt]), positions, cache)
    shapes = static.dynamic_shapes()                        # any number of tokens in a call
    program = torch.export.export(static, (ids, positions, cache), dynamic_shapes=shapes)

Shapes are those of model/network.py; S is the context.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.errors import UserError
from mobilellm.model.network import Attention, Block, Network, RMSNorm, rotate
from mobilellm.model.rope import cos_sin


class StaticNetwork(nn.Module):
    """The forward of `network` at a fixed context, over the network's own parameters."""

    def __init__(self, network: Network, context: int) -> None:
        """`UserError` when `context` is not from 1 to the network's max_position_embeddings."""
        super().__init__()
        if network.config.feed_forward != "swiglu":
            raise UserError("a feed-forward with ReLU is for training and evaluation alone")
        longest = network.config.max_position_embeddings
        if not 1 <= context <= longest:
            raise UserError(f"context {context}: must be from 1 to the model's {longest} positions")
        self.config, self.context = network.config, context
        self.embed_tokens, self.layers = network.embed_tokens, network.layers
        self.norm, self.lm_head = network.norm, network.lm_head
        self.cos: Tensor
        self.sin: Tensor
        device = network.embed_tokens.weight.device
        for name, table in zip(("cos", "sin"), cos_sin(network.config, context), strict=True):
            # (S, 1, D/2)
            self.register_buffer(name, table.unsqueeze(1).to(device), persistent=False)

    def empty_cache(self, batch_size: int = 1) -> Tensor:
        """A cache of zeros: keys and values of every slot, (2, kv_slots, B, K, S, D)."""
        config, weight = self.config, self.embed_tokens.weight
        return weight.new_zeros(
            2,
            config.kv_slots,
            batch_size,
            config.num_key_value_heads,
            self.context,
            config.head_dim,
        )

    def dynamic_shapes(self) -> dict[str, Any]:
        """For `torch.export.export`: any number of tokens from 1 to the context in a call."""
        tokens = torch.export.Dim("tokens", min=1, max=self.context)
        return {"input_ids": {1: tokens}, "positions": {0: tokens}, "cache": {}}

    def forward(self, input_ids: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) after `input_ids` (B, T), and the cache with their keys and values.

        `positions` (T,) says where the tokens stand, each below S; the cache must hold every
        position before them. The cache given is left as it is.
        """
        rotation = (self.cos[positions], self.sin[positions])
        # A token sees its own position and all before it; what the cache holds after it is masked.
        places = torch.arange(self.context, device=positions.device)
        specs = [spec.within(self.context) for spec in self.config.attention_specs]
        masks = {spec: spec.sees(positions, places) for spec in dict.fromkeys(specs)}  # (T, S)
        x, pairs = self.embed_tokens(input_ids), list(cache.unbind(1))
        filled, pair = [], cache
        for number, slot, fills in self.config.applications:
            block = cast(Block, self.layers[number])
            if fills:
                pair = _filled(block, x, rotation, positions, pairs[slot])
                filled.append(pair)
            x = x + _attend(block, x, rotation, masks[specs[number]], pair)
            x = x + _feed_forward(block, x)
        logits = F.linear(_normed(x, self.norm), self._output_weight())
        return logits, torch.stack(filled, dim=1)

    def _output_weight(self) -> Tensor:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm in operations that every runtime has."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def _heads(attention: Attention, x: Tensor, first: int, count: int) -> Tensor:
    """`count` heads of the stacked Q, K and V from `first` on: (B, T, C) -> (B, T, count, D)."""
    width = attention.head_dim
    rows = attention.qkv_proj.weight[first * width : (first + count) * width]
    return F.linear(x, rows).unflatten(-1, (count, width))


def _filled(
    layer: Block,
    x: Tensor,
    rotation: tuple[Tensor, Tensor],
    positions: Tensor,
    pair: Tensor,
) -> Tensor:
    """One slot, (2, B, K, S, D), with the keys and values of x (B, T, C) put at `positions`."""
    attention = layer.self_attn
    normed = _normed(x, layer.input_layernorm)
    key = _heads(attention, normed, attention.heads, attention.kv_heads)
    value = _heads(attention, normed, attention.heads + attention.kv_heads, attention.kv_heads)
    if attention.k_norm is not None:
        key = _normed(key, attention.k_norm)
    new = torch.stack((rotate(key, *rotation), value)).transpose(2, 3)  # (2, B, K, T, D)
    return pair.index_copy(3, positions, new)


def _attend(
    layer: Block, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, pair: Tensor
) -> Tensor:
    """What attention over the positions that `mask` (T, S) allows adds to x (B, T, C)."""
    attention = layer.self_attn
    query = _heads(attention, _normed(x, layer.input_layernorm), 0, attention.heads)
    if attention.q_norm is not None:
        query = _normed(query, attention.q_norm)
    query = rotate(query, *rotation).transpose(1, 2)  # (B, H, T, D)
    groups = attention.heads // attention.kv_heads
    key, value = pair.repeat_interleave(groups, dim=2).unbind(0)  # each (B, H, S, D)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return F.linear(out.transpose(1, 2).flatten(2), attention.o_proj.weight)


def _feed_forward(layer: Block, x: Tensor) -> Tensor:
    """What the feed-forward adds to x (B, T, C)."""
    normed = _normed(x, layer.post_attention_layernorm)
    gate, up = F.linear(normed, layer.mlp.gate_up_proj.weight).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
