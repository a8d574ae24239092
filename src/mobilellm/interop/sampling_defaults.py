"""How a model's makers sample from it: generation_config.json, and GGUF's keys for some of it.

    settings = read_settings(Path("SmolLM2-135M-Instruct"))     # {"temperature": 0.6, "top_p": 0.9}
    sampling_of(settings)                # what of it `generate` takes: temperature, top_k, ...
    add_keys(writer, settings)           # into GGUF; a line for what it has no key for

Settings are kept as they stand, whatever they mean, so that a conversion passes them on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilellm.files import read_json

FILE = "generation_config.json"
MAX_BYTES = 1 << 20
# Said elsewhere: ids are the configuration's and the tokenizer's.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
NOT_KEPT = (*IDS, "transformers_version", "_from_model_config")
# transformers' name -> what follows general.sampling. in GGUF.
GGUF_NAMES = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def read_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json says but for ids; empty where there is none."""
    where = folder / FILE
    values = read_json(where, limit=MAX_BYTES) if where.is_file() else {}
    if not isinstance(values, dict):
        return {}
    return {key: v for key, v in values.items() if key not in NOT_KEPT and v is not None}


def from_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What the keys of a GGUF file say, under transformers' names."""
    named = {ours: keys.get(f"general.sampling.{theirs}") for ours, theirs in GGUF_NAMES.items()}
    # Both float32 in the file: 0.6 is 0.6000000238 there.
    found = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in named.items()
        if _is_number(value)
    }
    return found | {"do_sample": True} if found else {}


def add_keys(writer: Any, settings: Mapping[str, Any]) -> list[str]:
    """Write what GGUF has a key for; a line that names the rest."""
    settings = dict(settings)
    greedy = settings.pop("do_sample", None) is False
    if greedy:
        settings |= {"temperature": 0.0}
    for name, value in settings.items():
        if name in GGUF_NAMES and _is_number(value):
            add = getattr(writer, f"add_sampling_{GGUF_NAMES[name]}")
            add(int(value) if name == "top_k" else float(value))
    lost = sorted(settings.keys() - GGUF_NAMES.keys())
    return [f"GGUF has no key for generation_config.json's {', '.join(lost)}"] if lost else []


def sampling_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature, top_k, top_p, and min_p and repetition_penalty where they act; nothing where the
    settings do not say how to sample.

    What they leave open is no cut, and `do_sample` false is a temperature of 0, as in transformers.
    Values that cannot be meant are left out.
    """
    acting = {
        "min_p": lambda v: 0 < v <= 1,
        "repetition_penalty": lambda v: v > 0 and v != 1,
    }
    more = {
        name: settings[name]
        for name, acts in acting.items()
        if _is_number(settings.get(name)) and acts(settings[name])
    }
    if settings.get("do_sample") is False:
        more.pop("min_p", None)
        return {"temperature": 0.0, "top_k": 0, "top_p": 1.0} | more
    fitting = {
        "temperature": lambda v: v >= 0,
        "top_k": lambda v: v >= 0 and v == int(v),
        "top_p": lambda v: 0 < v <= 1,
    }
    found = {
        name: settings[name]
        for name, fits in fitting.items()
        if _is_number(settings.get(name)) and fits(settings[name])
    }
    if not found and "min_p" not in more:
        return {}
    return {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | found | more


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
