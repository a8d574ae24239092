"""`mobilellm info`: a model's own numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mobilellm.printable import one_line
from mobilellm.terminal.output import print_json, put


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
    check: bool = False
    """Compare the ids of some twenty texts with those of the tool that the format is for: llama.cpp
    for a GGUF, transformers or SentencePiece for a folder. Exit status 1 where any differ."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Look up or read, and print."""
        from mobilellm.model.config import ModelConfig, preset_names
        from mobilellm.model.costs import ModelCosts
        from mobilellm.terminal.model_rows import file_rows, model_rows, sharing

        if not self.model:
            presets = {
                name: ModelCosts.of(ModelConfig.preset(name)).parameters["total"]
                for name in preset_names()
            }
            if self.json:
                print_json({"presets": presets})
            else:
                for name, total in presets.items():
                    put(f"{name:8} {total:>14,} parameters")
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
        checked = None
        if self.check:
            from mobilellm.workflows.token_check import check_tokenizer

            checked = check_tokenizer(Path(self.model))
            facts["token_check"] = dataclasses.asdict(checked)
        status = int(checked is not None and bool(checked.differences))
        if self.json:
            print_json(facts)
            return status
        rows = model_rows(config, numbers, length)
        rows += file_rows(tokenizer, quantization, origin, checked)
        for name, value in rows:
            put(one_line(f"{name:16} {value}"))
        return status
