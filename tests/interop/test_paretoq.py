"""ParetoQ's checkpoints are read on their grid, and their integers go out as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.interop.networks import transformers_llama
from transformers import LlamaForCausalLM

from mobilellm.errors import UserError
from mobilellm.families.names import gguf_name, reordered
from mobilellm.families.paretoq import integers_and_steps
from mobilellm.interop.load import load
from mobilellm.model.weights import to_named
from mobilellm.workflows.convert import convert

IDS = torch.arange(60)[None] * 37 % 300
BITS = (0, 1, 2, 3, 4)


def published(weight: torch.Tensor, ranges: torch.Tensor, bits: int) -> torch.Tensor:
    """What a matrix becomes in ParetoQ's layers, as its paper and code define it.

    3 and 4 bits are a learned step's; 2 and 1.58 round within 0.99 of the range, to levels that lie
    evenly in it; 1 is the sign. Everything is computed in the weights' number type.
    """
    a = torch.where(ranges > 1e-5, ranges, torch.tensor(1e-5))
    if bits == 1:
        return weight.sign() * a
    if bits in (3, 4):
        return (weight / a).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * a
    within = (weight / a).clamp(-0.99, 0.99)
    if bits == 2:
        return ((within * 2 - 0.5).round() + 0.5) / 2 * a
    return (within * 1.5).round() / 1.5 * a


def initial_ranges(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """As its training begins, moved a little as if learned."""
    largest = weight.abs().amax(1, keepdim=True)
    if bits == 1:
        largest = weight.abs().mean(1, keepdim=True)
    elif bits in (3, 4):
        largest = largest / (2 ** (bits - 1) - 1)
    return largest * torch.linspace(0.6, 1.1, len(weight))[:, None]


@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_the_published_quantizer(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(40, 96) * 0.05
    ranges = initial_ranges(weight, bits)
    ranges[3] = 1e-7  # below the smallest range
    ranges[4] = -0.1
    weight[5, :7] = 0
    integers, steps = integers_and_steps(weight, ranges, bits)
    assert torch.equal(integers.float() * steps, published(weight, ranges, bits))
    assert integers.abs().max() <= 8
    halves = integers_and_steps(weight.bfloat16(), ranges.bfloat16(), bits)
    # The network rounds each product to bf16, once more; the integers are the same.
    wanted = published(weight.bfloat16(), ranges.bfloat16(), bits).float()
    torch.testing.assert_close(halves[0] * halves[1], wanted, atol=1e-9, rtol=0.01)


def checkpoint(folder: Path, bits: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A folder as ParetoQ's training leaves it; and transformers' network of the same values."""
    model = transformers_llama(folder, dtype)
    named = load_file(folder / "model.safetensors")
    for name in [n for n in named if n.endswith("_proj.weight")]:
        ranges = initial_ranges(named[name].float(), bits).to(dtype)
        named[name.removesuffix("weight") + "weight_clip_val"] = ranges
        model.state_dict()[name].copy_(published(named[name], ranges, bits))
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    where = folder / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"w_bits": bits}))
    return model


@pytest.mark.parametrize("bits", BITS)
def test_logits_are_those_of_the_quantized_network(tmp_path: Path, bits: int) -> None:
    model = checkpoint(tmp_path / "m", bits)
    loaded = load(tmp_path / "m")
    with torch.no_grad():
        found, expected = loaded.network(IDS), model(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert loaded.quantized is not None
    assert len(loaded.quantized.weights) == 8
    parameters = dict(loaded.network.named_parameters())
    for name, weight in loaded.quantized.weights.items():
        assert torch.equal(weight.dequantized(), parameters[name]), name


@pytest.mark.parametrize("bits", BITS)
def test_q4_0_holds_the_integers_and_scales_in_float16(tmp_path: Path, bits: int) -> None:
    gguf = pytest.importorskip("gguf")
    checkpoint(tmp_path / "m", bits)
    result = convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    assert result.precision == "Q4_0"
    assert any("scales in float16" in note for note in result.notes)
    named = load_file(tmp_path / "m/model.safetensors")
    network = load(tmp_path / "m").network
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name in to_named(network.config, dict(network.named_parameters())):
        if not name.endswith("_proj.weight"):
            continue
        ranges = named[name.removesuffix("weight") + "weight_clip_val"]
        step = ranges * {0: 2 / 3, 2: 0.25}.get(bits, 1.0)
        integers = (published(named[name], ranges, bits) / step).round()
        expected = reordered(network.config, name, integers * step.half().float(), to="neighbors")
        tensor = tensors[gguf_name(name)]
        assert tensor.tensor_type.name == "Q4_0"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, expected.numpy()), name
    assert tensors["token_embd.weight"].tensor_type.name == "F32"


def test_in_bf16_the_integers_go_through_every_format(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", 2, torch.bfloat16)
    result = convert(tmp_path / "m", tmp_path / "m.gguf", "gguf")
    assert result.largest_difference == 0  # a scale of bf16 is exact in float16
    assert "token_embd.weight is BF16: quantizing left it as it is" in result.notes
    for to in ("hf", "mobilellm"):
        convert(tmp_path / "m", tmp_path / to, to)
        again = load(tmp_path / to).quantized
        assert again is not None
        assert again.facts["w_bits"] == 2
        for name, weight in load(tmp_path / "m").quantized.weights.items():
            assert torch.equal(again.weights[name].integers, weight.integers)
            assert torch.equal(again.weights[name].scales, weight.scales)


def test_scales_that_bf16_does_not_hold_are_kept_in_float32(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", 0)
    result = convert(tmp_path / "m", tmp_path / "out", "hf")
    assert result.largest_difference == 0
    again, before = load(tmp_path / "out").quantized, load(tmp_path / "m").quantized
    for name, weight in before.weights.items():
        assert torch.equal(again.weights[name].scales, weight.scales)


def test_onnx_has_the_integers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint(tmp_path / "m", 4)
    result = convert(tmp_path / "m", tmp_path / "onnx", "onnx", precision="INT4")
    assert any("8 significant bits" in note for note in result.notes)
    assert result.same_first_choice > 0.9


@pytest.mark.parametrize("bits", [5, -1, "two", True])
def test_other_numbers_of_bits_are_refused(tmp_path: Path, bits: object) -> None:
    checkpoint(tmp_path / "m", 4)
    where = tmp_path / "m/config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"w_bits": bits}))
    with pytest.raises(UserError, match="w_bits = "):
        load(tmp_path / "m")


def test_a_matrix_without_its_range_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", 4)
    named = load_file(tmp_path / "m/model.safetensors")
    del named["model.layers.1.mlp.up_proj.weight_clip_val"]
    save_file(named, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has no weight_clip_val"):
        load(tmp_path / "m")


def test_32_bits_are_a_plain_model(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "m", 4)
    model.save_pretrained(tmp_path / "plain")
    where = tmp_path / "plain/config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"w_bits": 32}))
    loaded = load(tmp_path / "plain")
    assert loaded.quantized is None
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(IDS), model(IDS).logits, atol=1e-5, rtol=0)
