"""A conversion keeps what a model's files say beside its weights: number type and sampling."""

import json
from pathlib import Path

import pytest
import torch
from tests.interop.networks import checkpoint, logits, network, transformers_llama
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from mobilellm.cli import main
from mobilellm.interop import folder as folder_module
from mobilellm.interop.load import load, sampling_defaults
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

OWN = {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1}


def theirs(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """A folder that transformers wrote, in a number type, with sampling settings of its own."""
    model = transformers_llama(folder, dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 3], **OWN)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_the_number_type_that_they_have(tmp_path: Path, dtype: torch.dtype) -> None:
    model = theirs(tmp_path / "in", dtype)
    result = convert(tmp_path / "in", tmp_path / "out", "hf")
    assert result.largest_difference == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("precision", ["BF16", "F16"])
def test_a_number_type_can_be_asked_for(tmp_path: Path, precision: str) -> None:
    model = theirs(tmp_path / "in", torch.float32)
    convert(tmp_path / "in", tmp_path / "out", "hf", precision=precision)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[precision]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_large_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    folder = checkpoint(tmp_path / "in", model)
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 200_000)
    convert(folder, tmp_path / "out", "hf")
    shards = sorted((tmp_path / "out").glob("model-0*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert shards[-1].name.endswith(f"-of-{len(shards):05}.safetensors")
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    torch.testing.assert_close(logits(load(tmp_path / "out").network), logits(model))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(40)[None] * 37 % 300
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, logits(model), atol=1e-5, rtol=1e-5)


def test_sampling_settings_are_passed_on(tmp_path: Path) -> None:
    theirs(tmp_path / "in", torch.float32)
    convert(tmp_path / "in", tmp_path / "out", "hf")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    before = GenerationConfig.from_pretrained(tmp_path / "in")
    for name in (*OWN, "eos_token_id", "bos_token_id"):
        assert getattr(kept, name) == getattr(before, name), name
    convert(tmp_path / "in", tmp_path / "m.gguf", "gguf")
    from gguf import GGUFReader

    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.sampling.temp"].contents() == pytest.approx(0.6)
    assert fields["general.sampling.top_k"].contents() == 7
    assert fields["general.sampling.penalty_repeat"].contents() == pytest.approx(1.1)
    wanted = {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1}
    for name in ("in", "out", "m.gguf"):
        assert sampling_defaults(tmp_path / name) == wanted
    convert(tmp_path / "m.gguf", tmp_path / "again", "hf")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(again, name) for name in OWN} == OWN


def test_generate_samples_as_the_models_makers_do(
    tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "m", network(), train_bpe([sample_text[:30_000]], 320))

    def used(*flags: str) -> dict[str, float]:
        arguments = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1", "--json"]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *flags])
        assert not stopped.value.code
        found = json.loads(capsys.readouterr().out)["sampling"]
        return {name: found[name] for name in ("temperature", "top_k", "top_p")}

    assert used() == {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
    where = folder / "generation_config.json"
    values = json.loads(where.read_text())
    where.write_text(json.dumps(values | {"do_sample": True, "temperature": 0.6, "top_k": 20}))
    assert used() == {"temperature": 0.6, "top_k": 20, "top_p": 1.0}
    assert used("--temperature", "0", "--top-k", "3") == {"temperature": 0, "top_k": 3, "top_p": 1}
    where.write_text(json.dumps(values | {"do_sample": False}))
    assert used()["temperature"] == 0
    where.write_text(json.dumps(values | {"temperature": "hot", "top_p": 7}))
    assert used() == {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
