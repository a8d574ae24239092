"""Small random networks and their checkpoints, which the tests of this room share."""

from pathlib import Path

import torch

from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import Tokenizer

IDS = torch.arange(40)[None] * 37 % 300


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
