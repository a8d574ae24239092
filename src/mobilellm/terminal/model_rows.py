"""What `mobilellm info` prints of a model's configuration, as rows of name and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.report.figures import count
from mobilellm.terminal.output import size

if TYPE_CHECKING:
    from mobilellm.workflows.token_check import TokenCheck


def sharing(config: ModelConfig) -> str | None:
    """Layer sharing in a few words, or None."""
    if config.layer_repeats == 1:
        return None
    order = "" if config.layer_order == "immediate" else f", layer_order={config.layer_order}"
    return f"{config.layer_repeats}x, shared_kv={config.shared_kv}{order}"


def _windows(config: ModelConfig) -> list[tuple[str, str]]:
    """A row for sliding windows, where there are any."""
    sliding = [spec.window for spec in config.attention_specs if spec.window is not None]
    words = f"{config.sliding_window} tokens in {len(sliding)} of {config.num_hidden_layers} layers"
    return [("sliding window", words)] if sliding else []


def model_rows(config: ModelConfig, costs: ModelCosts, length: int) -> list[tuple[str, str]]:
    """What is printed of a model, as (name, value); `length` is the tokens a sequence."""
    parameters, flops = costs.parameters, costs.flops_per_token(length)
    total, cache = parameters["total"], costs.kv_cache_bytes_per_token()
    layers, width = config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    tied = "tied" if config.tie_word_embeddings else "untied"
    weights = ", ".join(f"{name} {size(n)}" for name, n in costs.memory_bytes().items())
    parts = [
        (f"  {name}", f"{n:,}  {n / total:.1%}")
        for name, n in parameters.items()
        if n and name != "total"
    ]
    feed_forward, context = config.intermediate_size, config.max_position_embeddings
    return [
        ("parameters", f"{total:,}"),
        *parts,
        ("shape", f"{layers} layers x {width} wide, feed-forward {feed_forward}"),
        ("heads", f"{heads} query, {kv_heads} key and value, {config.head_dim} wide"),
        ("vocabulary", f"{config.vocab_size:,}, {tied}"),
        ("context", f"{context:,} tokens"),
        *_windows(config),
        ("layer sharing", sharing(config) or "none"),
        ("training FLOPs", f"{count(flops['six_n'])} a token (6N)"),
        ("", f"{count(flops['palm'])} with attention at {length:,} tokens (PaLM's count)"),
        ("KV cache", f"{cache:,} bytes a token in 16 bit"),
        ("", f"{size(costs.kv_cache_bytes(context))} for the whole context"),
        ("weights", weights),
    ]


def file_rows(
    tokenizer: dict[str, Any] | None,
    quantization: dict[str, Any] | None,
    origin: dict[str, Any],
    checked: TokenCheck | None,
) -> list[tuple[str, str]]:
    """What is printed of a model's files: its tokenizer, grid and origin, and how ids compare."""
    rows = []
    if tokenizer and "fault" in tokenizer:
        rows.append(("tokenizer", f"cannot be read: {tokenizer['fault']}"))
    elif tokenizer:
        name, tokens = tokenizer["name"], tokenizer["vocab_size"]
        rows.append(("tokenizer", f"{name}, {tokens:,} tokens, sha256 {tokenizer['sha256'][:12]}"))
    if quantization:
        scheme, method, facts = quantization.values()
        embedding = facts.get("embedding") if isinstance(facts, dict) else None
        rows.append(("quantization", f"{scheme} by {method}, embedding {embedding}"))
    if origin:
        rows.append(("origin", ", ".join(f"{key} {value}" for key, value in origin.items())))
    if checked is not None:
        count = len(checked.differences)
        other = f"other for {count} of" if count else "the same for"
        rows.append(("ids", f"{other} {checked.texts} texts as {checked.tool}'s"))
        rows += [("", line) for line in checked.differences]
    return rows
