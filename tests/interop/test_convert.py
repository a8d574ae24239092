"""Every format out and in again, on random weights."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tests.interop.networks import IDS, checkpoint, logits, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.interop.repeats import folded, plain, unrolled
from mobilellm.interop.writers import WRITERS
from mobilellm.model.config import ModelConfig, preset_names
from mobilellm.model.weights import to_named
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 300)


SHAPES = [
    {},
    {"tie_word_embeddings": False},
    {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 96,
        "head_dim": 32,
        "intermediate_size": 256,
    },
    {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("to", list(WRITERS))
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_comes_back_equal(
    tmp_path: Path, tokenizer: Tokenizer, to: str, shape: dict
) -> None:
    model = network(**shape)
    source, out = checkpoint(tmp_path / "in", model, tokenizer), tmp_path / "out"
    out = out.with_suffix(WRITERS[to].suffix)
    result = convert(source, out, to)
    assert result.largest_difference is not None
    assert result.largest_difference < 1e-5
    again = load(out)
    for name, parameter in again.network.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    assert again.tokenizer is not None
    text = "First Citizen: 2 words"
    assert again.tokenizer.encode(text) == tokenizer.encode(text)
    assert again.tokenizer.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_scaled_down_loads_in_transformers(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = ModelConfig.preset(name)
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    model = network(
        hidden_size=heads * 8,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=8,
        intermediate_size=64,
        layer_repeats=config.layer_repeats,
        shared_kv="own",
        qk_norm=config.qk_norm,
        sliding_window=5 if config.layer_types else None,
        layer_types=config.layer_types and config.layer_types[:2],
    )
    convert(checkpoint(tmp_path / "in", model), tmp_path / "out", "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    kind = "Qwen3" if config.qk_norm else "Cwm" if config.layer_types else "Llama"
    assert type(theirs).__name__ == f"{kind}ForCausalLM"
    with torch.no_grad():
        assert (theirs(IDS).logits - logits(model)).abs().max() < 1e-5
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_layer_sharing_goes_out_unrolled_and_comes_back_folded(tmp_path: Path) -> None:
    for repeats in (2, 3):
        model = network(layer_repeats=repeats)
        source = checkpoint(tmp_path / f"in{repeats}", model)
        convert(source, tmp_path / f"hf{repeats}", "hf")
        flat, back = load(tmp_path / f"hf{repeats}"), load(tmp_path / f"hf{repeats}", fold=True)
        assert flat.config.num_hidden_layers == 2 * repeats
        assert (back.config.num_hidden_layers, back.config.layer_repeats) == (2, repeats)
        for other in (flat, back):
            assert (logits(other.network) - logits(model)).abs().max() < 1e-5


def test_folding_takes_only_equal_neighbours() -> None:
    model = network(num_hidden_layers=4)
    assert folded(model) is model
    flat = unrolled(network(layer_repeats=2))
    with torch.no_grad():
        flat.layers[3].mlp.down_proj.weight[0, 0] += 1e-3
    assert folded(flat).config.layer_repeats == 1


def test_shared_keys_and_values_have_no_plain_equal(tmp_path: Path) -> None:
    model = network(layer_repeats=2, shared_kv="first")
    source = checkpoint(tmp_path / "in", model)
    for to in (name for name, writer in WRITERS.items() if not writer.keeps_repeats):
        with pytest.raises(UserError, match="no equal among plain Llama"):
            convert(source, tmp_path / "out.gguf", to)
    result = convert(source, tmp_path / "out", "hf", approximate=True)
    assert any("approximate" in note for note in result.notes)
    assert result.largest_difference > 1e-2
    assert (
        logits(plain(model, approximate=True)) - logits(load(tmp_path / "out").network)
    ).abs().max() < 1e-6
    convert(source, tmp_path / "kept", "mobilellm")
    assert load(tmp_path / "kept").config == model.config


@pytest.mark.parametrize("precision", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantized_gguf_is_near_and_says_how_near(
    tmp_path: Path, tokenizer: Tokenizer, precision: str
) -> None:
    model = network()
    result = convert(
        checkpoint(tmp_path / "in", model, tokenizer),
        tmp_path / "out.gguf",
        "gguf",
        precision=precision,
    )
    bound = {"F16": 0.01, "BF16": 0.1, "Q8_0": 0.2, "Q4_0": 3.0}[precision]
    assert 0 < result.largest_difference < bound * result.logit_std
    types = load(tmp_path / "out.gguf").origin["tensor_types"]
    # Of a type of four bits the embedding is Q8_0.
    wanted = {"F32": 5, "Q8_0": 1, "Q4_0": 14} if precision == "Q4_0" else {"F32": 5, precision: 15}
    assert types == wanted
    size = (tmp_path / "out.gguf").stat().st_size
    bits = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5}[precision]
    embedding = model.embed_tokens.weight.numel()
    others = sum(p.numel() for p in model.parameters()) - embedding
    assert size < (others * bits + embedding * max(bits, 8.5)) / 8 + 40_000


def test_rows_that_blocks_do_not_fit_stay_f16_and_are_named(tmp_path: Path) -> None:
    result = convert(
        checkpoint(tmp_path / "in", network(intermediate_size=172)),
        tmp_path / "out.gguf",
        "gguf",
        precision="Q8_0",
    )
    assert any("blk.0.ffn_down.weight is F16: its rows of 172" in note for note in result.notes)


def test_the_result_records_where_it_came_from(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "in", network())
    result = convert(source, tmp_path / "out", "hf")
    origin = json.loads((tmp_path / "out/mobilellm.json").read_text())
    assert origin["source_sha256"] == result.source_sha256
    assert origin["came_from"] == {"made_by": "a test"}
    assert origin["settings"]["to"] == "hf"
    assert load(tmp_path / "out").origin == origin


def test_an_existing_target_is_refused_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "in", network())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "out", "hf")
    (tmp_path / "out").rmdir()
    import mobilellm.workflows.convert as module

    monkeypatch.setattr(
        module,
        "load",
        lambda path, **_: (
            load(source) if path == source else (_ for _ in ()).throw(UserError("no"))
        ),
    )
    for name, to in (("out", "hf"), ("out.gguf", "gguf")):
        with pytest.raises(UserError, match="no"):
            convert(source, tmp_path / name, to)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_python_interface(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import mobilellm

    model = mobilellm.load(str(checkpoint(tmp_path / "m", network(), tokenizer)))
    text = model.generate(
        "First", max_new_tokens=8, sampling=mobilellm.Sampling(temperature=0.8, seed=1)
    )
    assert isinstance(text, str)
    assert model.network(torch.tensor([model.tokenizer.encode("a b")])).shape[-1] == 320
    with pytest.raises(mobilellm.UserError):
        mobilellm.load(str(tmp_path / "none"))
    assert dataclasses.is_dataclass(mobilellm.ModelConfig)
    assert to_named(model.config, dict(model.network.named_parameters()))


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_not_rounded_to_four_bits(tmp_path: Path, tied: bool) -> None:
    import gguf

    model = network(tie_word_embeddings=tied)
    convert(checkpoint(tmp_path / "in", model), tmp_path / "out.gguf", "gguf", precision="Q4_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    eight = {name for name, kind in types.items() if kind == "Q8_0"}
    assert eight == {"token_embd.weight"} | (set() if tied else {"output.weight"})
    table = load(tmp_path / "out.gguf").network.embed_tokens.weight
    error = (table - model.embed_tokens.weight).abs().amax(dim=1)
    assert (error <= model.embed_tokens.weight.abs().amax(dim=1) / 127).all()
