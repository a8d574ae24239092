"""A folder that onnxruntime, onnxruntime-genai and transformers.js load.

    notes = write(folder, model)               # a ModelToWrite: network, tokenizer, "ALL"

| file | what it is for |
|---|---|
| onnx/model.onnx | float32 |
| onnx/model_q4.onnx | 4-bit blocks, 8-bit embedding and output layer: processors and WebGPU |
| onnx/model_int8.onnx | 8-bit weights and activations: WebAssembly has no fast 4-bit product |
| config.json, generation_config.json | read by transformers.js; layers are the cache's slots |
| genai_config.json | read by onnxruntime-genai; names the first there is of q4, int8, fp32 |
| tokenizer.json, tokenizer_config.json, special_tokens_map.json | the tokenizer |
| mobilellm.json | where the model came from |

File names are those by which transformers.js finds its number types fp32, q4 and int8. A file is
written tensor by tensor, so that writing takes no memory to speak of; putting a float network onto
the grid takes a copy of it, one at a time.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.export.onnx_graph import MAX_MESSAGE
from mobilellm.export.onnx_network import FLOAT_ACTIVATIONS, INT8_ACTIVATIONS, Build
from mobilellm.files import write_json
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.quantized import Quantized

FOLDER = "onnx"
FILES = {"INT4": "model_q4.onnx", "INT8": "model_int8.onnx", "F32": "model.onnx"}
"""By number type, the best for a processor first."""
ALL = "ALL"
MADE_FROM = {"INT4": ("int4", "search"), "INT8": ("w8a8", "round")}
"""Scheme and method by which a float network is put onto the grid of a number type."""
USUAL_LENGTH = 2048
"""Positions that onnxruntime-genai takes memory for where its caller names no number."""


def write(path: Path, model: ModelToWrite, max_message: int = MAX_MESSAGE) -> list[str]:
    """Write the files of a number type, or all, into an existing folder.

    Each is run and compared where `model.check` is given: the 4-bit file twice, once with float
    activations, when it has to equal the network on its grid. Returns a line for each thing that
    is not as asked. `UserError` for a network that the operators cannot say.
    """
    config = model.network.config
    context = model.context or config.max_position_embeddings
    notes = [] if model.tokenizer is not None else ["no tokenizer: the source has none"]
    wanted = _wanted(model)
    (path / FOLDER).mkdir()
    if model.tokenizer is not None:
        model.tokenizer.save(path)
    for number_type in wanted:
        try:
            network, quantized = _on_grid(model, number_type, notes)
        except UserError as error:  # a width that groups of 32 do not divide
            if model.number_type != ALL:
                raise
            notes.append(f"no {FILES[number_type]}: {error.what}")
            continue
        notes += _write_file(path, model, number_type, network, quantized, max_message)
    written = [file.name for file in sorted((path / FOLDER).iterdir())]
    _write_settings(path, config, context, written)
    write_json(path / "mobilellm.json", model.origin)
    return notes


def _wanted(model: ModelToWrite) -> list[str]:
    """The number types to write: of a quantized model, float32 and the one that has its integers.

    `UserError` when another one is asked for.
    """
    types = ["F32", "INT4", "INT8"] if model.number_type == ALL else [model.number_type]
    if model.quantized is None:
        return types
    bits = model.quantized.kind.bits
    fitting = ["F32", f"INT{bits}"]
    if model.number_type not in (ALL, *fitting):
        raise UserError(
            f"precision {model.number_type}: the model is quantized to {bits} bits",
            hint=f"use --precision {fitting[1]}, or convert the model from before quantizing",
        )
    return [number_type for number_type in types if number_type in fitting]


def _on_grid(
    model: ModelToWrite, number_type: str, notes: list[str]
) -> tuple[Network, Quantized | None]:
    """The network as this number type holds it, and what of it is on the grid."""
    if number_type == "F32":
        return model.network, None
    if model.quantized is not None:
        return model.network, model.quantized
    scheme, method = MADE_FROM[number_type]
    network = copy.deepcopy(model.network)
    quantized = quantized_network(network, scheme, method)
    notes.append(
        f"{FILES[number_type]}: put onto the grid of {scheme} by {method}; "
        "`mobilellm quantize` knows better methods"
    )
    return network, quantized


def _write_file(
    path: Path,
    model: ModelToWrite,
    number_type: str,
    network: Network,
    quantized: Quantized | None,
    max_message: int,
) -> list[str]:
    """One of the files, run and compared; returns notes."""
    file, config = path / FOLDER / FILES[number_type], network.config
    context = model.context or config.max_position_embeddings
    metadata = {
        "context": str(context),
        "end_tokens": json.dumps(config.end_tokens),
        "number_type": number_type,
    }
    if quantized is not None:
        metadata |= {"scheme": quantized.scheme, "method": quantized.method}

    def put(where: Path, accuracy_level: int) -> list[Path]:
        build = Build(
            network,
            context=context,
            quantized=quantized,
            int8_columns=number_type == "INT8",
            accuracy_level=accuracy_level,
        )
        return build.graph.write(where, build.inputs, build.outputs, metadata, max_message)

    check = model.check
    if check is not None and number_type == "INT4":
        exact = file.with_name("exact.onnx")
        made = put(exact, FLOAT_ACTIVATIONS)
        check(exact, network, True)
        for other in made:
            other.unlink()
    put(file, INT8_ACTIVATIONS)
    if check is None:
        return []
    found = check(file, network, number_type == "F32")
    return [] if number_type == "F32" else [f"{file.name}: {found}"]


def _write_settings(path: Path, config: ModelConfig, context: int, written: list[str]) -> None:
    """config.json, generation_config.json and genai_config.json."""
    values = config.to_dict()
    for key in (
        "layer_repeats",
        "shared_kv",
        "qk_norm",
        "qk_norm_gain",
        "layer_types",  # said within the graph, layer by layer
        "sliding_window",
        "use_sliding_window",
        "rope_parameters",
    ):
        values.pop(key, None)
    kind = "qwen3" if config.qk_norm else "llama"  # whichever: a decoder with a cache
    values |= {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": kind,
        "num_hidden_layers": config.kv_slots,
        "max_position_embeddings": context,
    }
    apart = [name.removesuffix("_data") for name in written if name.endswith("_data")]
    if apart:
        values["transformers.js_config"] = {"use_external_data_format": dict.fromkeys(apart, 1)}
    write_json(path / "config.json", values)
    ends = config.end_tokens
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(
        path / "generation_config.json",
        {key: value for key, value in generation.items() if value is not None},
    )
    best = next(file for file in FILES.values() if file in written)
    begin = config.bos_token_id if config.bos_token_id is not None else (ends or [0])[0]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{FOLDER}/{best}",
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.kv_slots,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    genai: dict[str, Any] = {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": begin,
            "eos_token_id": ends or [begin],
            "pad_token_id": (ends or [begin])[0],
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
            "max_length": min(context, USUAL_LENGTH),
            "past_present_share_buffer": True,
        },
    }
    write_json(path / "genai_config.json", genai)
