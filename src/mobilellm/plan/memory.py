"""Memory of one device while training: counted from the configuration, as train/ lays it out.

    memory = estimate(config, sequence_length=2048, micro_batch_size=8, precision="bf16", optimizer="adamw")
    memory.peak               # bytes
    memory.parts              # {"weights": ..., "gradients": ..., "moments": ..., "activations": ..., "logits": ...}

Weights, gradients and moments are float32; under bf16 the products' copies of the weights count among the activations,
since they live as long. Tested against tracked allocations (tests/plan/test_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.loss import CHUNK_NUMBERS

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    parts: dict[str, int]
    """Weights, gradients, moments, activations, logits: each at its own largest."""
    peak: int
    """The most that is held at once."""
    activations_per_token: int
    """Bytes kept from the forward pass for the backward pass, a token of the micro-batch."""


def activation_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes a token leaves behind in the forward pass for the backward pass."""
    e = 2 if precision == "bf16" else 4  # a number that enters a product
    d, ffn = config.hidden_size, config.intermediate_size
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    norm = 4 * d + 4  # its input, which is the residual stream (float32), and the scale
    attention = (
        d * e + (q + 2 * kv) * e + q * e + 4 * config.num_attention_heads
    )  # input; Q, K, V; output; log-sum-exp
    feed_forward = d * e + 2 * ffn * e + ffn * e  # input; gate and up; their product
    block = 2 * norm + attention + feed_forward
    if config.qk_norm:
        block += (q + kv) * e + 4 * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * config.layer_repeats * block + norm + 4 * d


def estimate(
    config: ModelConfig, *, sequence_length: int, micro_batch_size: int, precision: Precision, optimizer: str = "adamw",
    accumulating: bool = False, shards: int = 1,
) -> Memory:  # fmt: skip
    """Memory of one device. `micro_batch_size` sequences a pass; `accumulating` when a step has several; `shards` processes
    that FSDP divides weights, gradients and moments among."""
    groups = ModelCosts.of(config).parameters
    total, inside = groups["total"], groups["attention"] + groups["feed_forward"]
    output = config.vocab_size * config.hidden_size
    weights, gradients = 4 * total, 4 * total
    moments = 8 * total if optimizer == "adamw" else 4 * inside + 8 * (total - inside)
    per_token = activation_bytes(config, precision)
    tokens = sequence_length * micro_batch_size
    kept = per_token * tokens
    if precision == "bf16":
        kept += 2 * inside
    rows = min(tokens, max(16, CHUNK_NUMBERS // config.vocab_size))
    # Of one chunk: logits in the products' precision and float32, its softmax, and the softmax in the products' precision.
    chunk = rows * config.vocab_size * (4 + 4 if precision == "fp32" else 2 + 4 + 2)
    logits = (
        chunk + 4 * output + (2 * output if precision == "bf16" else 0)
    )  # and the output layer's gradient and copy
    block = 4 * inside // config.num_hidden_layers
    gathered = (
        0 if shards == 1 else 4 * output + 2 * block
    )  # FSDP gathers the embedding, and a block ahead
    standing = (weights + moments) // shards
    forward = standing + gathered + kept + logits + (gradients // shards if accumulating else 0)
    step = standing + gradients // shards
    if optimizer == "muon":
        step += _muon_scratch(config, precision)
    parts = {"weights": weights // shards, "gradients": gradients // shards, "moments": moments // shards,
             "activations": kept, "logits": logits}  # fmt: skip
    return Memory(parts=parts, peak=max(forward, step), activations_per_token=per_token)


def _muon_scratch(config: ModelConfig, precision: Precision) -> int:
    """Directions of all matrices, and the iteration over the largest group of equal shapes."""
    e = 2 if precision == "bf16" else 4
    inside = ModelCosts.of(config).parameters
    feed_forward = inside["feed_forward"]
    return 4 * (inside["attention"] + feed_forward) + 4 * e * feed_forward
