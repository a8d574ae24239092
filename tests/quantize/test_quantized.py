"""The grid, and a quantized checkpoint on disk and back."""

from pathlib import Path

import pytest
import torch
from tests.model.shapes import WIDTH_64

from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.quantize.grid import GridWeight, dequantized, on_grid, portable
from mobilellm.quantize.quantized import Quantized


def quantized_network() -> tuple[Network, Quantized]:
    torch.manual_seed(0)
    network, weights = Network(WIDTH_64), {}
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2:
            bits = 8 if name == "embed_tokens.weight" else 4
            rows, columns = parameter.shape
            groups = 1 if bits == 8 else columns // 32
            integers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
            scales = portable(torch.rand(rows, groups) * 0.1)
            weights[name] = GridWeight(integers=integers, scales=scales, bits=bits)
            parameter.data.copy_(weights[name].dequantized())
    return network, Quantized(scheme="int4", method="round", weights=weights)


def test_scales_are_exact_in_every_type_and_never_too_small() -> None:
    scales = portable(torch.tensor([0.0, -1.0, 1e-9, 0.1, 3.14159]))
    assert torch.equal(scales.half().float(), scales)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert float(scales.min()) == 2.0**-14


def test_integers_come_back_from_the_values() -> None:
    integers = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    scales = portable(torch.rand(5, 2))
    found = on_grid(dequantized(integers, scales), scales, 4)
    assert torch.equal(found.integers, integers)
    with pytest.raises(UserError, match="do not lie on the grid"):
        on_grid(dequantized(integers, scales) + 1e-3, scales, 4)


def test_a_quantized_checkpoint_is_read_back_to_the_bit(tmp_path: Path) -> None:
    network, quantized = quantized_network()
    save_checkpoint(tmp_path, network, None, {})
    quantized.save(tmp_path, network.config)
    read = load(tmp_path).quantized
    assert read is not None
    assert (read.scheme, read.method, set(read.weights)) == (
        "int4",
        "round",
        set(quantized.weights),
    )
    for name, weight in quantized.weights.items():
        assert torch.equal(read.weights[name].integers, weight.integers), name
        assert torch.equal(read.weights[name].scales, weight.scales), name


def test_weights_changed_afterwards_are_refused(tmp_path: Path) -> None:
    network, quantized = quantized_network()
    quantized.save(tmp_path, network.config)
    with torch.no_grad():
        network.layers[1].mlp.down_proj.weight[3, 5] += 1e-4
    save_checkpoint(tmp_path, network, None, {})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj"):
        load(tmp_path)


def test_unrolling_and_folding_keep_the_grids() -> None:
    _, quantized = quantized_network()
    unrolled = quantized.unrolled([0, 0, 1, 1])
    assert len([name for name in unrolled.weights if name.startswith("layers.3.")]) == 4
    assert (
        unrolled.weights["layers.3.mlp.down_proj.weight"]
        is (quantized.weights["layers.1.mlp.down_proj.weight"])
    )
    assert dict(unrolled.folded(2).weights) == dict(quantized.weights)
