"""The network as ExecuTorch's exporter traces it: fixed cache, products on the grid.

    module = ExecutorchNetwork(network, context=1024, quantized=quantized)
    logits = module(torch.tensor([[1, 2, 3]]), torch.tensor([0]))     # (1, 1, V)

Tokens (1, T) come with the position of the first of them; the cache lies in the program. Logits are
those of the last token alone. A cache and an attention of ExecuTorch's own serve instead of those
of model/static.py: they write into the cache in place and read no further than the text goes.

Matrices on the grid carry the grid's own integers and scales. XNNPACK multiplies them by
activations that it rounds to int8, token by token. A block that is applied several times is one
module, so that its matrices are stored once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilellm.model.network import Attention, Block, Network, rotate
from mobilellm.model.rope import cos_sin
from mobilellm.quantize.grid import GridWeight
from mobilellm.quantize.quantized import Quantized

SMALLEST, LARGEST = -128, 127  # of an embedding's bytes


class ExecutorchNetwork(nn.Module):
    """The forward of `network` with a cache of `context` positions."""

    def __init__(self, network: Network, context: int, quantized: Quantized | None) -> None:
        super().__init__()
        import executorch.extension.llm.custom_ops.custom_ops  # registers llama::custom_sdpa
        import executorch.kernels.quantized  # noqa: F401  registers embedding_byte

        config = network.config
        self.config, self.context = config, context
        grids = {} if quantized is None else quantized.weights
        self.embedding = _embedding(network.embed_tokens.weight.detach(), grids)
        self.blocks = nn.ModuleList(
            _Block(cast(Block, layer), f"layers.{i}.", grids)
            for i, layer in enumerate(network.layers)
        )
        self.norm = _Norm(network.norm.weight.detach(), network.norm.eps)
        head = "embed_tokens.weight" if network.lm_head is None else "lm_head.weight"
        self.head = _linear(network.output_weight.detach(), grids.get(head))
        for name, table in zip(("cos", "sin"), cos_sin(config, context), strict=True):
            self.register_buffer(name, table.unsqueeze(1), persistent=False)  # (S, 1, D/2)
        shape = (1, context, config.num_key_value_heads, config.head_dim)
        for slot in range(config.kv_slots):
            for name in ("key", "value"):
                self.register_buffer(f"{name}{slot}", torch.zeros(shape), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits (1, 1, V) after `tokens` (1, T), the first of which stands at `input_pos` (1,)."""
        start: Any = input_pos[0].item()  # a number of the tracer, of which nothing is known
        count = tokens.shape[1]
        torch._check(start >= 0)
        torch._check(start + count <= self.context)
        cos, sin = (cast(Tensor, getattr(self, name)) for name in ("cos", "sin"))
        rotation = (cos.narrow(0, start, count), sin.narrow(0, start, count))
        x, slot = self.embedding(tokens), 0
        for block in self.blocks:
            for repeat in range(self.config.layer_repeats):
                filled = repeat > 0 and self.config.shared_kv == "first"
                at = slot - 1 if filled else slot
                cache = (getattr(self, f"key{at}"), getattr(self, f"value{at}"))
                x = block(x, rotation, start, cache, filled)
                slot = at + 1
        return cast(Tensor, self.head(self.norm(x[:, -1:])))


class _Norm(nn.Module):
    """RMSNorm in operations that XNNPACK has."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class _Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, layer: Block, name: str, grids: Any) -> None:
        super().__init__()
        attention: Attention = layer.self_attn
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim = attention.head_dim
        self.attention_norm, self.mlp_norm = (
            _Norm(norm.weight.detach(), norm.eps)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.q_norm, self.k_norm = (
            None if norm is None else _Norm(norm.weight.detach(), norm.eps)
            for norm in (attention.q_norm, attention.k_norm)
        )

        def matrix(where: str, weight: Tensor) -> nn.Linear:
            return _linear(weight.detach(), grids.get(f"{name}{where}.weight"))

        self.qkv = matrix("self_attn.qkv_proj", attention.qkv_proj.weight)
        self.out = matrix("self_attn.o_proj", attention.o_proj.weight)
        self.gate_up = matrix("mlp.gate_up_proj", layer.mlp.gate_up_proj.weight)
        self.down = matrix("mlp.down_proj", layer.mlp.down_proj.weight)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        start: Any,
        cache: tuple[Tensor, Tensor],
        filled: bool,
    ) -> Tensor:
        """x (1, T, C) -> (1, T, C). A cache (1, S, K, D) that is `filled` already holds the keys
        and values of these tokens; else they are put there."""
        heads = self.heads + 2 * self.kv_heads
        stacked = self.qkv(self.attention_norm(x)).unflatten(-1, (heads, self.head_dim))
        query = stacked[:, :, : self.heads]
        query = rotate(query if self.q_norm is None else self.q_norm(query), *rotation)
        key_cache, value_cache = cache
        if not filled:
            key = stacked[:, :, self.heads : self.heads + self.kv_heads]
            key = rotate(key if self.k_norm is None else self.k_norm(key), *rotation)
            value = stacked[:, :, self.heads + self.kv_heads :]
            torch.ops.llama.update_cache(key, key_cache, start)
            torch.ops.llama.update_cache(value, value_cache, start)
        seen = torch.ops.llama.custom_sdpa(
            query, key_cache, value_cache, start, None, 0.0, True
        )  # (1, T, H, D)
        x = x + self.out(seen.flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return cast(Tensor, x + self.down(F.silu(gate) * up))


def _linear(weight: Tensor, grid: GridWeight | None) -> nn.Linear:
    """A matrix (out, in) in float32, or as integers and scales with activations of int8."""
    rows, columns = weight.shape
    module = nn.Linear(columns, rows, bias=False, device="meta")
    parameter: Any = weight.contiguous() if grid is None else _integers(grid)
    module.weight = nn.Parameter(parameter, requires_grad=False)
    return module


def _integers(grid: GridWeight) -> Any:
    """torchao's tensor of integers that ExecuTorch's XNNPACK partitioner knows."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    return IntxUnpackedToInt8Tensor(
        grid.integers,
        grid.scales,
        torch.zeros_like(grid.scales, dtype=torch.int8),
        getattr(torch, f"int{grid.bits}"),
        (1, grid.group),
        torch.float32,
        IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )


class _ByteEmbedding(nn.Module):
    """An embedding of int8 rows, each with a scale."""

    def __init__(self, grid: GridWeight) -> None:
        super().__init__()
        self.integers: Tensor
        self.scales: Tensor
        self.register_buffer("integers", grid.integers)
        self.register_buffer("scales", grid.scales.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(
            Tensor,
            torch.ops.quantized_decomposed.embedding_byte(
                self.integers, self.scales, None, SMALLEST, LARGEST, tokens
            ),
        )


def _embedding(weight: Tensor, grids: Any) -> nn.Module:
    grid = grids.get("embed_tokens.weight")
    return nn.Embedding.from_pretrained(weight) if grid is None else _ByteEmbedding(grid)
