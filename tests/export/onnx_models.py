"""Small random networks, written as ONNX, and what onnxruntime computes from the files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all heads": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "own": {"layer_repeats": 2},
    "first": {"layer_repeats": 2, "shared_kv": "first"},
    "first, three times, qk_norm": {"layer_repeats": 3, "shared_kv": "first", "qk_norm": True},
    "own, qk_norm, untied": {"layer_repeats": 2, "qk_norm": True, "tie_word_embeddings": False},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "wide heads": {"head_dim": 32},
}


def network(**changes: Any) -> Network:
    """A small random network whose norms are not one."""
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    found = Network(ModelConfig(**values | changes))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.15)
    return found.eval()


def logits(model: Network, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of our network."""
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].numpy()


def run(file: Path, ids: list[int], chunks: list[int]) -> np.ndarray:
    """onnxruntime's logits (chunks, V) of the last position of each chunk, whose cache goes from
    call to call as the file's inputs and outputs say."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = [port.name for port in session.get_outputs()]
    past = {
        port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32)
        for port in session.get_inputs()
        if port.name.startswith("past_key_values")
    }
    found, at = [], 0
    for count in chunks:
        fed = np.array([ids[at : at + count]])
        at += count
        mask = np.ones((1, at), np.int64)
        values = session.run(None, {"input_ids": fed, "attention_mask": mask, **past})
        named = dict(zip(outputs, values, strict=True))
        past = {name: named[name.replace("past_key_values", "present")] for name in past}
        assert named["logits"].shape[:2] == (1, 1)
        found.append(named["logits"][0, 0])
    return np.stack(found)


def largest_difference(file: Path, model: Network, ids: list[int]) -> float:
    """Between onnxruntime's logits and our network's, whole, in chunks and one by one, as a share
    of their spread."""
    expected, worst = logits(model, ids), 0.0
    count = len(ids)
    for chunks in ([count], [7, 1, 5, count - 13], [1] * count):
        last = np.cumsum(chunks) - 1
        worst = max(worst, float(np.abs(run(file, ids, chunks) - expected[last]).max()))
    return worst / max(1.0, float(expected.std()))


def mean_kl(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected || found) of logits (T, V), nats a token."""
    p, q = (torch.from_numpy(values).log_softmax(-1) for values in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())
