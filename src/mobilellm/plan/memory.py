"""Memory of one device while training: counted from the configuration, as train/ lays it out.

    batching = Batching.of(sequence_length=2048, batch_tokens=16384)
    adamw = OptimizerCosts(matrix_bytes=8)
    memory = estimate(config, batching, precision=Precision.BF16, optimizer=adamw)
    memory.peak               # bytes
    memory.parts              # {"weights": ..., "gradients": ..., "moments": ..., ...}

Weights, gradients and moments are float32; under bf16 the products' copies of the weights count
among the activations, since they live as long. Tested against tracked allocations
(tests/plan/test_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.loss import CHUNK_NUMBERS
from mobilellm.model.precision import Precision
from mobilellm.plan.batching import Batching


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    parts: dict[str, int]
    """Weights, gradients, moments, activations, logits: each at its own largest."""
    peak: int
    """The most that is held at once."""
    activations_per_token: int
    """Bytes kept from the forward pass for the backward pass, a token of the micro-batch."""


@dataclass(frozen=True, kw_only=True)
class OptimizerCosts:
    """What a kind of optimizer holds."""

    matrix_bytes: int
    """Bytes kept for each parameter of the matrices inside the blocks."""
    other_bytes: int = 8
    """Bytes kept for each other parameter: AdamW's two moments."""
    orthogonalizes: bool = False
    """Whether a step iterates over copies of the matrices, as Muon's does."""


def activation_bytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes that the forward pass keeps of a token for the backward pass."""
    e = precision.bytes  # a number that enters a product
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
    config: ModelConfig,
    batching: Batching,
    *,
    precision: Precision,
    optimizer: OptimizerCosts,
    sharded: bool = False,
    compiled: bool = False,
) -> Memory:
    """Memory of one device. With `sharded` FSDP divides weights, gradients and moments among all
    processes.
    `compiled` is for runs that compile, as long ones do.
    """
    groups = ModelCosts.of(config).parameters
    total, inside = groups["total"], groups["attention"] + groups["feed_forward"]
    shards = batching.world_size if sharded else 1
    output = config.vocab_size * config.hidden_size
    weights, gradients = 4 * total, 4 * total
    moments = optimizer.matrix_bytes * inside + optimizer.other_bytes * (total - inside)
    per_token = activation_bytes(config, precision)
    tokens = batching.sequence_length * batching.micro_batch_size
    kept = per_token * tokens
    if precision is Precision.BF16:
        kept += 2 * inside
    rows = min(tokens, max(16, CHUNK_NUMBERS // config.vocab_size))
    # A chunk holds its logits, in whose place the gradient comes where nothing is compiled; in bf16
    # the softmax is in float32 then.
    fp32 = 4 + 4 if compiled else 4
    chunk = rows * config.vocab_size * (fp32 if precision is Precision.FP32 else 2 + 4 + 2)
    # The output layer's gradient and copy come on top.
    logits = chunk + 4 * output + (2 * output if precision is Precision.BF16 else 0)
    block = 4 * inside // config.num_hidden_layers
    # FSDP gathers the embedding, and a block ahead.
    gathered = 0 if shards == 1 else 4 * output + 2 * block
    standing = (weights + moments) // shards
    accumulated = gradients // shards if batching.passes > 1 else 0
    forward = standing + gathered + kept + logits + accumulated
    step = standing + gradients // shards
    if optimizer.orthogonalizes:
        step += _orthogonalizing_scratch(config, precision)
    parts = {
        "weights": weights // shards,
        "gradients": gradients // shards,
        "moments": moments // shards,
        "activations": kept,
        "logits": logits,
    }
    return Memory(parts=parts, peak=max(forward, step), activations_per_token=per_token)


def _orthogonalizing_scratch(config: ModelConfig, precision: Precision) -> int:
    """Directions of all matrices, and the iteration over the largest group of equal shapes."""
    e = precision.bytes
    inside = ModelCosts.of(config).parameters
    feed_forward = inside["feed_forward"]
    gate_and_up = 2 * feed_forward // 3
    return e * (inside["attention"] + feed_forward) + 2 * e * gate_and_up
