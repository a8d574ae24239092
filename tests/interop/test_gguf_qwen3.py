"""The network with QK-norm goes to GGUF as qwen3, and comes back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.interop.networks import checkpoint, logits, network, transformers_qwen3
from transformers import Qwen3ForCausalLM

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.runtimes.table import open_session
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

IDS = [i * 37 % 300 for i in range(60)]


def test_transformers_qwen3_runs_in_llama_cpp(tmp_path: Path, sample_text: str) -> None:
    pytest.importorskip("xllamacpp")
    model = transformers_qwen3(tmp_path / "m")
    train_bpe([sample_text[:30_000]], 320).save(tmp_path / "m")
    result = convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    assert result.largest_difference < 1e-6
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0, -1].numpy()
    with open_session(tmp_path / "m.gguf", "llama.cpp", context=64, threads=1) as session:
        found = session.feed(IDS)
    # keys and values are F16 there
    assert np.abs(found - expected).max() < 1e-2 * expected.std()


def test_a_file_of_qwen3_comes_back_as_transformers_network(tmp_path: Path) -> None:
    model = transformers_qwen3(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", "hf")
    found = Qwen3ForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_our_network_with_qk_norm_comes_back(tmp_path: Path) -> None:
    model = network(qk_norm=True)
    folder = checkpoint(tmp_path / "m", model)
    convert(folder, tmp_path / "m.gguf", "gguf")
    read = load(tmp_path / "m.gguf").network
    assert read.config.qk_norm
    torch.testing.assert_close(logits(read), logits(model))


def test_llama_3s_rotary_scaling_is_refused(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = checkpoint(tmp_path / "m", network(qk_norm=True, rope_scaling=scaling))
    with pytest.raises(UserError, match="qwen3"):
        convert(folder, tmp_path / "m.gguf", "gguf")
