"""What a network of a given configuration amounts to: parameters, FLOPs, cache bytes. Computed,
never built.

    numbers = ModelCosts.of(ModelConfig.preset("125M"))
    numbers.parameters["total"]   # 124635456

Planning, MFU and reports all ask here; none counts again.
"""

from __future__ import annotations

from dataclasses import dataclass

from mobilellm.model.attention_spec import AttentionSpec
from mobilellm.model.config import ModelConfig
from mobilellm.model.precision import Precision

BYTES_PER_PARAMETER = {p.value: float(p.bytes) for p in Precision} | {"int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """Figures of one network."""

    parameters: dict[str, int]
    """Stored parameters by group: embedding, attention, feed_forward, norm, lm_head (0 when tied),
    total."""
    applied_parameters: int
    """Parameters that multiply each token: blocks times their repeats, and the output layer; no
    embedding look-up."""
    executed_layers: int
    """Blocks times repeats."""
    kv_slots: int
    """Key/value pairs a token leaves in the cache (fewer than executed_layers when later
    applications reuse K and V)."""
    kv_width: int
    """Numbers in one key (or value) over all its heads."""
    attention_width: int
    """num_attention_heads x head_dim."""
    attention: tuple[AttentionSpec, ...]
    """What each executed layer looks at."""
    slots: tuple[AttentionSpec, ...]
    """What each key/value pair is kept for."""

    @classmethod
    def of(cls, config: ModelConfig) -> ModelCosts:
        """Count from the configuration alone."""
        d, layers, repeats = config.hidden_size, config.num_hidden_layers, config.layer_repeats
        q, kv = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        embedding = config.vocab_size * d
        head_norms = config.head_dim if config.qk_norm and config.qk_norm_gain else 0
        matrices = 3 if config.feed_forward == "swiglu" else 2
        attention, feed_forward = d * (q + 2 * kv) + q * d, matrices * d * config.intermediate_size
        groups = {
            "embedding": embedding,
            "attention": layers * attention,
            "feed_forward": layers * feed_forward,
            "norm": layers * (2 * d + 2 * head_norms) + d,
            "lm_head": 0 if config.tie_word_embeddings else embedding,
        }
        reused = layers * repeats - config.kv_slots  # applications that skip K and V
        return cls(
            parameters=groups | {"total": sum(groups.values())},
            applied_parameters=layers
            * repeats
            * (attention + feed_forward + 2 * d + 2 * head_norms)
            - reused * 2 * d * kv
            + d
            + embedding,
            executed_layers=layers * repeats,
            kv_slots=config.kv_slots,
            kv_width=kv,
            attention_width=q,
            attention=tuple(config.attention_specs[i] for i in config.application_order),
            slots=config.slot_specs,
        )

    def flops_per_token(self, sequence_length: int) -> dict[str, int]:
        """FLOPs to train on one token, forward and backward, under two conventions.

        `six_n`: 6 x every parameter that multiplies the token, the tied embedding counted once, as
        output layer. `palm`: that plus 12 x layers x attention width x sequence_length (PaLM, arXiv
        2204.02311, appendix B; the causal mask is not discounted, and a layer with a sliding window
        counts that instead of a longer sequence). At 125M and 2048 tokens they differ by a factor
        of 1.57."""
        six_n = 6 * self.applied_parameters
        seen = sum(spec.held(sequence_length) for spec in self.attention)
        return {"six_n": six_n, "palm": six_n + 12 * self.attention_width * seen}

    def kv_cache_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """Bytes of keys and values that one token adds to the cache (2 bytes a number: bf16 or
        fp16); with sliding windows only until they are full."""
        return 2 * self.kv_slots * self.kv_width * bytes_per_number

    def kv_cache_bytes(self, length: int, bytes_per_number: int = 2) -> int:
        """Bytes of all keys and values that the cache holds after `length` tokens."""
        return 2 * sum(s.held(length) for s in self.slots) * self.kv_width * bytes_per_number

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the weights alone at each precision (int8 and int4 without their scales)."""
        return {
            name: round(self.parameters["total"] * size)
            for name, size in BYTES_PER_PARAMETER.items()
        }
