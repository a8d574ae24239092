"""`mobilellm info`: a model's own numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mobilellm.report.figures import count
from mobilellm.terminal.output import print_json, size

if TYPE_CHECKING:
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.costs import ModelCosts


@dataclass(frozen=True, kw_only=True)
class Info:
    """Parameters, FLOPs a token, cache and memory of a preset or of a model on disk.

    With no name, the presets are listed.

    Example: mobilellm info 125M
    """

    model: tyro.conf.Positional[str] = ""
    """A preset, a config.json, a run, a checkpoint, a Hugging Face folder, a GGUF file or a
    llama2.c file."""
    sequence_length: int = 2048
    """Tokens a sequence, for the FLOPs that attention adds (at most the model's context)."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Look up or read, and print."""
        from mobilellm.model.config import ModelConfig, preset_names
        from mobilellm.model.costs import ModelCosts

        if not self.model:
            presets = {
                name: ModelCosts.of(ModelConfig.preset(name)).parameters["total"]
                for name in preset_names()
            }
            if self.json:
                print_json({"presets": presets})
            else:
                for name, total in presets.items():
                    print(f"{name:8} {total:>14,} parameters")
            return 0
        origin: dict[str, Any] = {}
        quantization = None
        tokenizer = None
        if Path(self.model).exists():
            if self.model.endswith(".json"):
                config = ModelConfig.read(Path(self.model))
            else:
                from mobilellm.interop.load import describe, recognize
                from mobilellm.quantize.quantized import read_summary

                config, tokenizer, origin = describe(Path(self.model))
                quantization = read_summary(recognize(Path(self.model))[1])
        else:
            config, origin = ModelConfig.preset(self.model), {"preset": self.model}
        numbers = ModelCosts.of(config)
        length = min(self.sequence_length, config.max_position_embeddings)
        facts = {
            "config": dataclasses.asdict(config),
            "parameters": numbers.parameters,
            "executed_layers": numbers.executed_layers,
            "layer_sharing": sharing(config),
            "flops_per_token": numbers.flops_per_token(length) | {"sequence_length": length},
            "kv_cache_bytes_per_token": numbers.kv_cache_bytes_per_token(),
            "memory_bytes": numbers.memory_bytes(),
            "tokenizer": tokenizer,
            "quantization": quantization,
            "origin": origin,
        }
        if self.json:
            print_json(facts)
            return 0
        rows = model_rows(config, numbers, length)
        if tokenizer and "fault" in tokenizer:
            rows.append(("tokenizer", f"cannot be read: {tokenizer['fault']}"))
        elif tokenizer:
            name, tokens = tokenizer["name"], tokenizer["vocab_size"]
            rows.append(
                ("tokenizer", f"{name}, {tokens:,} tokens, sha256 {tokenizer['sha256'][:12]}")
            )
        if quantization:
            scheme, method, facts = quantization.values()
            embedding = facts.get("embedding") if isinstance(facts, dict) else None
            rows.append(("quantization", f"{scheme} by {method}, embedding {embedding}"))
        if origin:
            rows.append(("origin", ", ".join(f"{key} {value}" for key, value in origin.items())))
        for name, value in rows:
            print(f"{name:16} {value}")
        return 0


def sharing(config: ModelConfig) -> str | None:
    """Layer sharing in a few words, or None."""
    if config.layer_repeats == 1:
        return None
    return f"{config.layer_repeats}x, shared_kv={config.shared_kv}"


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
    feed_forward = config.intermediate_size
    return [
        ("parameters", f"{total:,}"),
        *parts,
        ("shape", f"{layers} layers x {width} wide, feed-forward {feed_forward}"),
        ("heads", f"{heads} query, {kv_heads} key and value, {config.head_dim} wide"),
        ("vocabulary", f"{config.vocab_size:,}, {tied}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("layer sharing", sharing(config) or "none"),
        ("training FLOPs", f"{count(flops['six_n'])} a token (6N)"),
        ("", f"{count(flops['palm'])} with attention at {length:,} tokens (PaLM's count)"),
        ("KV cache", f"{cache:,} bytes a token in 16 bit"),
        ("", f"{size(cache * config.max_position_embeddings)} for the whole context"),
        ("weights", weights),
    ]
