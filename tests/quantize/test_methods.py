"""Networks put onto the grid by each method."""

import dataclasses

import pytest
import torch
from tests.model.shapes import WIDTH_64

from mobilellm.errors import UserError
from mobilellm.model.network import Network
from mobilellm.quantize.grid import dequantized, portable
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.rounding import round_to_grid, search_grid


def made(**changes: object) -> Network:
    torch.manual_seed(0)
    return Network(dataclasses.replace(WIDTH_64, **changes)).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_clips_nothing_and_is_off_by_half_a_step_at_most(bits: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(7, 96)
    weight = round_to_grid(values, bits)
    assert weight.scales.shape == (7, 3 if bits == 4 else 1)
    assert torch.equal(portable(weight.scales), weight.scales)
    steps = (weight.dequantized() - values).abs().view(7, weight.scales.shape[1], -1)
    # A scale that its 8 bits made smaller clips the largest number by a 512th of it.
    assert bool((steps / weight.scales.unsqueeze(-1) <= 0.5 + 128 / 512).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_search_has_least_squares_among_all_portable_scales(bits: int) -> None:
    torch.manual_seed(2)
    values = torch.randn(3, 32 if bits == 4 else 512)
    found = search_grid(values, bits)
    # Every portable scale of the range, one by one.
    top = float(values.abs().max()) / 2 ** (bits - 1)
    tried = torch.arange(0.4, 1.5, 1 / 512).mul(top).to(torch.bfloat16).float().unique()
    for row in range(3):
        steps = (values[row] / tried[:, None]).round()
        steps = steps.clamp(-(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1)
        least = float((steps * tried[:, None] - values[row]).square().sum(-1).min())
        ours = float((found.dequantized()[row] - values[row]).square().sum())
        rounding = float(
            (round_to_grid(values[row][None], bits).dequantized()[0] - values[row]).square().sum()
        )
        assert ours <= 1.03 * least
        assert ours <= rounding


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    torch.manual_seed(3)
    values, importance = torch.randn(64, 32), torch.full((32,), 1e-3)
    importance[:4] = 1.0
    plain, weighted = search_grid(values, 4), search_grid(values, 4, importance)
    error = [(w.dequantized() - values).square()[:, :4].sum() for w in (plain, weighted)]
    assert error[1] < 0.9 * error[0]


@pytest.mark.parametrize("method", ["round", "search"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_put_on_the_grid_and_into_the_network(method: str, tied: bool) -> None:
    network = made(tie_word_embeddings=tied)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    quantized = quantized_network(network, "int4", method)
    matrices = {name for name, p in network.named_parameters() if p.ndim == 2}
    assert set(quantized.weights) == matrices
    assert len(matrices) == 8 + (1 if tied else 2)
    for name, parameter in network.named_parameters():
        if name not in matrices:
            assert torch.equal(parameter, before[name])
            continue
        weight = quantized.weights[name]
        assert weight.bits == (8 if name in ("embed_tokens.weight", "lm_head.weight") else 4)
        assert torch.equal(parameter, dequantized(weight.integers, weight.scales))
        error = (parameter - before[name]).norm() / before[name].norm()
        assert error < (0.01 if weight.bits == 8 else 0.12)


def test_a_float_embedding_is_left_alone() -> None:
    network = made(tie_word_embeddings=False)
    before = network.embed_tokens.weight.detach().clone()
    quantized = quantized_network(network, "int8", "round", embedding="float")
    assert torch.equal(network.embed_tokens.weight, before)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(quantized.weights)
    assert quantized.facts["embedding"] == "float"
    assert {weight.bits for weight in quantized.weights.values()} == {8}


def test_a_width_that_groups_do_not_divide_is_refused_before_anything_changes() -> None:
    network = made(intermediate_size=100)
    before = network.layers[0].self_attn.qkv_proj.weight.detach().clone()
    with pytest.raises(
        UserError, match=r"down_proj.weight: its 100 columns.*use a scheme.*int8 or w8a8"
    ):
        quantized_network(network)
    assert torch.equal(network.layers[0].self_attn.qkv_proj.weight, before)
    assert quantized_network(network, "int8").weights


@pytest.mark.parametrize("wrong", [{"scheme": "int3"}, {"method": "guess"}, {"embedding": "int4"}])
def test_unknown_names_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong.values()))):
        quantized_network(made(), **wrong)


def test_zeros_stay_zeros() -> None:
    network = made()
    with torch.no_grad():
        network.layers[0].mlp.down_proj.weight.zero_()
    for method in ("round", "search"):
        quantized_network(network, method=method)
        assert not network.layers[0].mlp.down_proj.weight.any()
