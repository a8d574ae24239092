"""MobileLLM-R1's network, which transformers calls llama4_text, is read and goes out as qwen3."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.golden.cases import BASE, make_data
from tests.interop.llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.interop.load import describe, load
from mobilellm.model.costs import ModelCosts
from mobilellm.recipe.recipe import Recipe
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.train.start import train
from mobilellm.workflows.convert import convert

IDS = [i * 37 % 300 for i in range(90)]
# The keys of MobileLLM-R1-140M's config.json, at a twentieth of its size.
R1 = {
    "vocab_size": 320,
    "hidden_size": 72,
    "intermediate_size": 40,  # of experts: nothing has this width
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "interleave_moe_layer_step": 0,
    "moe_layers": [],
    "no_rope_layers": [1, 1, 1],
    "use_qk_norm": True,
    "attn_temperature_tuning": False,
    "attention_chunk_size": 128,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}


def llama4(folder: Path, **changes) -> Llama4ForCausalLM:
    """transformers' own with random weights, saved, whose logits are spread by about 1."""
    torch.manual_seed(0)
    config = Llama4TextConfig(**(R1 | changes), initializer_range=0.15)
    model = Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(folder)
    return model


def ours(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(folder).network(torch.tensor([IDS]))


def theirs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def test_r1_is_one_network_in_transformers_here_as_qwen3_and_in_llama_cpp(
    tmp_path: Path, sample_text: str
) -> None:
    pytest.importorskip("xllamacpp")
    model = llama4(tmp_path / "r1")
    expected = theirs(model)
    read = load(tmp_path / "r1").network
    counted = ModelCosts.of(read.config).parameters["total"]
    assert counted == model.num_parameters() == sum(p.numel() for p in read.parameters())
    assert 0.5 < expected.std() < 5
    tokenizer = train_bpe([sample_text[:30_000]], 320)
    tokenizer.save(tmp_path / "r1")
    torch.testing.assert_close(ours(tmp_path / "r1"), expected, atol=1e-5, rtol=0)

    convert(tmp_path / "r1", tmp_path / "qwen3", "hf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3").eval()
    assert type(found).__name__ == "Qwen3ForCausalLM"
    torch.testing.assert_close(theirs(found), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(tmp_path / "qwen3"), expected, atol=1e-5, rtol=0)

    convert(tmp_path / "r1", tmp_path / "r1.gguf", "gguf")
    server = LlamaCpp(tmp_path / "r1.gguf")
    # Of a part of a character, and of an end token, llama.cpp's server gives none.
    words = [tokenizer.decode([i]) for i in expected[0].argmax(1).tolist()]
    counts = [n for n, word in enumerate(words, 1) if word and "\ufffd" not in word]
    for count in (counts[0], counts[len(counts) // 2], counts[-1]):
        scores = expected[0, count - 1].log_softmax(0)
        found = server.next_logprobs(IDS[:count], 320)
        assert len(found) == 320
        assert max(abs(scores[i].item() - x) for i, x in found.items()) < 1e-5


def test_without_qk_norm_it_is_llamas_network(tmp_path: Path) -> None:
    expected = theirs(llama4(tmp_path / "m", use_qk_norm=False, tie_word_embeddings=False))
    torch.testing.assert_close(ours(tmp_path / "m"), expected, atol=1e-5, rtol=0)
    convert(tmp_path / "m", tmp_path / "out", "hf")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(found).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(theirs(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_layers": [1]}, "mixture of experts"),
        ({"moe_layers": None, "interleave_moe_layer_step": 2}, "mixture of experts"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"attention_chunk_size": "many"}, "attention_chunk_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(tmp_path: Path, changes: dict, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(R1 | {"model_type": "llama4_text"} | changes))
    with pytest.raises(UserError, match=words):
        describe(tmp_path)


def test_the_context_ends_with_the_first_chunk_of_attention(tmp_path: Path) -> None:
    expected = theirs(llama4(tmp_path / "m", attention_chunk_size=96))
    loaded = load(tmp_path / "m")
    assert loaded.config.max_position_embeddings == 96
    assert any("96 tokens" in note for note in loaded.notes)
    torch.testing.assert_close(ours(tmp_path / "m"), expected, atol=1e-5, rtol=0)
    whole = load(llama4(tmp_path / "whole") and tmp_path / "whole")
    assert whole.config.max_position_embeddings == 128
    assert not whole.notes


def test_training_starts_from_it(tmp_path: Path) -> None:
    values = {key: dict(value) for key, value in BASE.items()}
    values["data"]["path"] = str(make_data(tmp_path))
    tokenizer = TokenFolder.open(tmp_path / "data").tokenizer()
    model = llama4(tmp_path / "m", vocab_size=tokenizer.vocab_size)
    tokenizer.save(tmp_path / "m")
    values["model"] = {"preset": "", "override": {}}
    values["start"] = {"from": str(tmp_path / "m")}
    values["train"] |= {"steps": 1, "checkpoint_every": 1}
    values["optimizer"] = {"learning_rate": 1e-9}
    run = train(tmp_path / "run", Recipe.from_dict(values)).run
    torch.testing.assert_close(ours(run), theirs(model), atol=1e-4, rtol=0)
    checkpoint = run / "checkpoints/step-00000001"
    other = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    torch.testing.assert_close(theirs(other), theirs(model), atol=1e-4, rtol=0)
    assert not load(run).config.qk_norm_gain  # it stays R1's network


def test_gains_that_the_network_has_none_of_are_refused(tmp_path: Path) -> None:
    llama4(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", "hf")
    named = load_file(tmp_path / "out/model.safetensors")
    named["model.layers.1.self_attn.k_norm.weight"][3] = 1.5
    save_file(named, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="qk_norm_gain"):
        load(tmp_path / "out")


def test_onnxruntime_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    llama4(tmp_path / "m")
    result = convert(tmp_path / "m", tmp_path / "onnx", "onnx", precision="F32")
    assert result.largest_difference < 1e-4
