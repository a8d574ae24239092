"""ExecuTorch: a folder with a program (.pte) and the tokenizer that its runner reads.

    notes = write(Path("folder"), model)       # a ModelToWrite: "F32", "INT4" or "INT8"

The apps of ExecuTorch for Android and iOS run the program by the C++ TextLLMRunner, which asks it
for its context, end tokens and the like by methods that return constants. A byte-level tokenizer
goes beside it as tokenizer.json; of a SentencePiece tokenizer the runner reads only tokenizer.model
rightly. The iOS app chooses the form of a prompt by the program's name, so that a model with a chat
template in the manner of ChatML is called smollm3.pte, and one in the manner of Llama 3 llama.pte.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mobilellm.errors import UserError
from mobilellm.export.executorch_file import store_once
from mobilellm.files import disk_errors, write_json
from mobilellm.gguf.tokenizer_parts import is_sentencepiece, sentencepiece_parts
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.config import ModelConfig
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.quantized import Quantized
from mobilellm.tokenizer.sentencepiece_file import write_model
from mobilellm.tokenizer.tokenizer import Tokenizer

SCHEMES = {"INT4": "8da4w", "INT8": "w8a8"}
"""The schemes that XNNPACK computes, by number type."""
METHOD = "search"
TRACED_TOKENS = 3  # of the example that is traced; any number of tokens is allowed afterwards


def write(path: Path, model: ModelToWrite) -> list[str]:
    """Write program and tokenizer into an existing folder; returns notes.

    `UserError` when ExecuTorch is not installed, and for a model that was quantized to another
    number of bits than is asked for.
    """
    require()
    config, context = model.network.config, model.context
    assert context is not None
    if config.windows_within(context):
        raise UserError(
            "ExecuTorch's attention (llama::custom_sdpa) has no sliding windows",
            hint=f"use --context {config.sliding_window}, within which nothing is hidden, or "
            "--to onnx",
        )
    network, quantized, notes = model.network, model.quantized, []
    if model.number_type == "F32":
        quantized = None  # weights on a grid stay there, as float32 numbers
    elif quantized is None:
        quantized = quantized_network(network, SCHEMES[model.number_type], METHOD)
        notes.append(
            f"put onto the grid of {quantized.scheme} by {METHOD}; "
            "`mobilellm quantize` knows better methods"
        )
    elif f"INT{quantized.kind.bits}" != model.number_type:
        raise UserError(
            f"precision {model.number_type}: the model is quantized to {quantized.kind.bits} bits",
            hint=f"use --precision INT{quantized.kind.bits}, or convert the original",
        )
    name = program_name(model.tokenizer)
    with _quiet():
        program = _program(model, quantized, context)
    with disk_errors(path), open(path / name, "wb") as file:
        program.write_to_file(file)
    with disk_errors(path):
        store_once(path / name)
    if model.tokenizer is None:
        notes.append("no tokenizer: the source has none")
    else:
        notes += write_tokenizer(path, model.tokenizer)
    facts = {"program": name, "context": context, "number_type": model.number_type}
    if quantized is not None:
        facts |= {"scheme": quantized.scheme, "method": quantized.method}
    write_json(path / "mobilellm.json", model.origin | {"executorch": facts})
    notes.append(f"{name}: {_prompt_form(name)}")
    return notes


def require() -> None:
    """`UserError` that names the extra, when ExecuTorch is not installed."""
    missing = [name for name in ("executorch", "torchao") if not find_spec(name)]
    if missing:
        raise UserError(
            f"ExecuTorch is not installed ({', '.join(missing)})",
            hint="pip install 'mobilellm[executorch]' (130 MB)",
        )


def program_name(tokenizer: Tokenizer | None) -> str:
    """What the program is called: the iOS app chooses the form of a prompt by it."""
    template = "" if tokenizer is None else tokenizer.chat_template or ""
    if "<|im_start|>" in template:
        return "smollm3.pte"
    return "llama.pte" if "<|start_header_id|>" in template else "model.pte"


def _prompt_form(name: str) -> str:
    forms = {"smollm3.pte": "ChatML", "llama.pte": "Llama 3's form"}
    if name in forms:
        return f"by this name the iOS app takes prompts in {forms[name]}"
    return "a name with smollm3 in it makes the iOS app take prompts in ChatML"


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> list[str]:
    """The files of a tokenizer, and tokenizer.model for the runner where it is of that kind."""
    tokenizer.save(path)
    if not is_sentencepiece(tokenizer):
        return ["give the runner tokenizer.json"]
    write_model(sentencepiece_parts(tokenizer), path / "tokenizer.model")
    return ["give the runner tokenizer.model: it loses the spaces of this kind of tokenizer.json"]


def _program(model: ModelToWrite, quantized: Quantized | None, context: int) -> Any:
    """The program, traced with any number of tokens and lowered to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    from mobilellm.export.executorch_module import ExecutorchNetwork

    module = ExecutorchNetwork(model.network, context, quantized).eval()
    example = (torch.ones(1, min(TRACED_TOKENS, context), dtype=torch.long), torch.tensor([0]))
    longest = torch.export.Dim("tokens", min=1, max=context - 1)
    with torch.no_grad():
        traced = torch.export.export(
            module, example, dynamic_shapes=({1: longest}, {0: 1}), strict=False
        )
    partitioners: list[Any] = [XnnpackPartitioner()]
    if quantized is not None:
        partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
    lowered = to_edge_transform_and_lower(
        traced,
        partitioner=partitioners,
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constants(model.network.config, context),
    )
    return lowered.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def constants(config: ModelConfig, context: int) -> dict[str, Any]:
    """What the C++ runner asks a program for."""
    found: dict[str, Any] = {
        "get_max_seq_len": context - 1,
        "get_max_context_len": context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
        "get_eos_ids": config.end_tokens,
    }
    bos = config.bos_token_id
    if isinstance(bos, int):
        found["get_bos_id"] = bos
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own workings from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
