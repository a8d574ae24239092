"""GPTQ: what it does to products, against the definition and against rounding alone."""

import dataclasses

import pytest
import torch
from tests.model.shapes import WIDTH_64
from tests.quantize.test_methods import made

from mobilellm.errors import UserError
from mobilellm.model.linear import Linear
from mobilellm.model.network import Network
from mobilellm.quantize import gptq
from mobilellm.quantize.gptq import gptq_grid
from mobilellm.quantize.grid import HIGHEST, LOWEST, dequantized
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.rounding import search_grid


def inputs(count: int, columns: int) -> torch.Tensor:
    """Inputs (count, columns) that depend on each other."""
    return torch.randn(count, columns) @ torch.randn(columns, columns) / columns**0.5


def by_definition(values: torch.Tensor, scales: torch.Tensor, moments: torch.Tensor, bits: int):
    """The optimal-brain-surgeon step of the paper, the inverse of what is left taken anew for each
    column, in float64: no Cholesky, no blocks."""
    columns = values.shape[1]
    left, result = values.double().clone(), torch.zeros(values.shape, dtype=torch.int8)
    moments = moments.double().clone()
    order = torch.argsort(moments.diagonal(), descending=True, stable=True).tolist()
    moments += gptq.DAMPING * moments.diagonal().mean() * torch.eye(columns)
    steps = scales.double().repeat_interleave(columns // scales.shape[1], 1)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(moments[rest][:, rest])
        chosen = (left[:, column] / steps[:, column]).round().clamp(LOWEST[bits], HIGHEST[bits])
        result[:, column] = chosen.to(torch.int8)
        error = (left[:, column] - chosen * steps[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (8, 70)])
def test_integers_are_those_of_the_definition(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    values, x = torch.randn(40, columns), inputs(300, columns)
    found = gptq_grid(values, bits, x.T @ x)
    scales = search_grid(values, bits).scales
    assert torch.equal(found.scales, scales)
    expected = by_definition(values, scales, x.T @ x, bits)
    # A sum in another order can round another way, once in a long while.
    assert float((found.integers == expected).float().mean()) > 0.995
    products = x @ values.T
    error = [(x @ w.dequantized().T - products).norm() for w in (found, search_grid(values, bits))]
    assert error[0] < 0.8 * error[1]


@pytest.mark.parametrize("x", [torch.zeros(4, 64), torch.ones(1, 64)])
def test_moments_without_an_inverse_are_taken_as_they_are(x: torch.Tensor) -> None:
    torch.manual_seed(0)
    values = torch.randn(8, 64)
    found = gptq_grid(values, 4, x.T @ x)
    assert float((found.dequantized() - values).abs().max()) < 1.0
    if not x.any():
        assert torch.equal(found.integers, search_grid(values, 4).integers)


SHAPES = {
    "plain": WIDTH_64,
    "sharing own": dataclasses.replace(WIDTH_64, layer_repeats=3),
    "sharing first": dataclasses.replace(WIDTH_64, layer_repeats=3, shared_kv="first"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_over_every_application_of_the_blocks_on_the_grid(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Network(SHAPES[shape]).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    tokens = torch.randint(0, WIDTH_64.vocab_size, (6, 16))
    seen: list[tuple[int, torch.Tensor]] = []
    real = gptq.gptq_grid

    def watched(values: torch.Tensor, bits: int, moments: torch.Tensor):
        seen.append((len(values), moments.clone()))
        return real(values, bits, moments)

    monkeypatch.setattr(gptq, "gptq_grid", watched)
    quantized = quantized_network(network, "int4", "gptq", calibration=tokens)
    assert not [m for m in network.modules() if isinstance(m, gptq.ObservedLinear)]
    for name, parameter in network.named_parameters():
        if name in quantized.weights:
            weight = quantized.weights[name]
            assert torch.equal(parameter, dequantized(weight.integers, weight.scales))
    # The last matrix's inputs do not depend on itself in its first application alone; for a block
    # that is applied once they are those of the finished network.
    last = network.layers[1].mlp.down_proj
    caught: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda module, given: caught.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        network(tokens)
    assert len(caught) == SHAPES[shape].layer_repeats
    found = seen[-1][1]
    first = caught[0].T @ caught[0]
    if shape == "plain":
        assert torch.allclose(found, first, rtol=1e-3, atol=1e-4)
    else:
        whole = sum(x.T @ x for x in caught)
        assert (found - whole).norm() < 0.3 * whole.norm() < (found - first).norm()
    assert len(seen) == (10 if shape == "sharing first" else 8)


def test_rows_that_later_applications_leave_out_have_the_moments_of_the_first() -> None:
    torch.manual_seed(0)
    matrix = Linear(32, 6)
    observed = gptq.ObservedLinear(matrix)
    first, later = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    with torch.no_grad():
        assert torch.equal(observed(first), matrix(first))
        assert torch.equal(observed.first(later, 4), matrix.first(later, 4))
        found = gptq._fitted(matrix.weight, 4, observed)
        a, b = first.flatten(0, 1), later.flatten(0, 1)
        upper = gptq_grid(matrix.weight[:4], 4, a.T @ a + b.T @ b)
        lower = gptq_grid(matrix.weight[4:], 4, a.T @ a)
    assert torch.equal(found.integers, torch.cat((upper.integers, lower.integers)))


def test_it_wins_over_search_where_inputs_depend_on_each_other() -> None:
    tokens = torch.randint(0, WIDTH_64.vocab_size, (32, 24))
    losses = []
    reference = made()
    with torch.no_grad():
        expected = reference.hidden(tokens)
        for method in ("search", "gptq"):
            network = made()
            quantized_network(network, "int4", method, "float", calibration=tokens)
            losses.append(float((network.hidden(tokens) - expected).square().mean()))
    assert losses[1] < 0.9 * losses[0]


def test_a_text_is_needed() -> None:
    network = made()
    before = network.embed_tokens.weight.detach().clone()
    with pytest.raises(UserError, match="gptq chooses integers by a text"):
        quantized_network(network, method="gptq")
    assert torch.equal(network.embed_tokens.weight, before)
