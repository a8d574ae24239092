"""Small random networks and their checkpoints, which the tests of this room share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Qwen3ForCausalLM

IDS = torch.arange(40)[None] * 37 % 300

# transformers' networks: two layers of Llama's kind
SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip


def network(**changes) -> Network:
    """A small random network whose norms are not one."""
    values = {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 128} | changes
    torch.manual_seed(0)
    found = Network(ModelConfig.preset("1M", **values))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.05)
    return found.eval()


def checkpoint(folder: Path, model: Network, tokenizer: Tokenizer | None = None) -> Path:
    """A checkpoint of `model` in a new folder."""
    folder.mkdir()
    save_checkpoint(folder, model, tokenizer, {"made_by": "a test"})
    return folder


def logits(model: Network) -> torch.Tensor:
    """Logits (1, 40, V) of the same tokens every time."""
    with torch.no_grad():
        return model(IDS)


def transformers_llama(
    folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> LlamaForCausalLM:
    """transformers' own network with random weights, and its folder as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def transformers_qwen3(folder: Path) -> Qwen3ForCausalLM:
    """The same with QK-norm, norms that are not one, and heads that do not make up the width."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return model
