"""GPTQ: what it does to products, against the definition and against rounding alone."""

import dataclasses

import pytest
import torch
from tests.model.shapes import WIDTH_64
from tests.quantize.test_methods import made

from mobilellm.errors import UserError
from mobilellm.model.network import Network
from mobilellm.quantize import gptq
from mobilellm.quantize.gptq import gptq_grid
from mobilellm.quantize.grid import HIGHEST, LOWEST, dequantized, portable
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
    moments = x.T @ x
    found = gptq_grid(values, bits, moments)
    importance = moments.diagonal() + gptq.DAMPING * moments.diagonal().mean()
    scales = search_grid(values, bits, importance).scales
    expected = by_definition(values, scales, moments, bits)
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


def products_error(values: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Squared error of the products of each row, (R,), in float64."""
    return ((values - weight).double() @ x.T.double()).square().sum(1)


@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (8, 70)])
def test_scales_are_fitted_to_the_integers(bits: int, columns: int) -> None:
    torch.manual_seed(0)
    values, x = torch.randn(40, columns), inputs(300, columns)
    first = search_grid(values, bits)
    scales = gptq.fitted_scales(values, first.integers, first.scales, x.T @ x)
    assert torch.equal(portable(scales), scales)
    errors = [
        products_error(values, x, dequantized(first.integers, s)) for s in (first.scales, scales)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    assert errors[1].sum() < (0.98 if bits == 4 else 0.999) * errors[0].sum()
    for factor in (1 - 2**-7, 1 + 2**-7):  # the neighbors of any scale are no better
        for group in range(scales.shape[1]):
            other = scales.clone()
            other[:, group] = portable(other[:, group] * factor)
            worse = products_error(values, x, dequantized(first.integers, other))
            assert bool((worse >= errors[1] * (1 - 1e-4)).all())


def test_the_change_towards_a_goal_is_that_of_least_squares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    values, x = torch.randn(6, 32), inputs(500, 32)
    other = x + 0.3 * torch.randn_like(x)
    lacking = (other - x) @ values.T
    sums = gptq.Sums(6, 32)
    sums.add(x, lacking)
    assert sums.tokens == 500
    half = gptq.towards_goal(values, sums)
    monkeypatch.setattr(gptq, "SHARE", 1.0)
    whole = gptq.towards_goal(values, sums)
    assert torch.allclose(half - values, (whole - values) / 2, atol=1e-6)
    sums.tokens = 32  # as many as columns
    few = gptq.towards_goal(values, sums)
    assert torch.allclose((few - values) * 2, (whole - values) * 532 / 500, atol=1e-5)
    sums.tokens = 10**9
    monkeypatch.setattr(gptq, "DAMPING", 1e-7)
    expected = torch.linalg.lstsq(x.double(), (other @ values.T).double()).solution.T
    assert torch.allclose(gptq.towards_goal(values, sums).double(), expected, atol=1e-3)


def read_in(
    network: Network, states: torch.Tensor, path: str, norm: str | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What enters a matrix of the last block as hidden states go through the network, and the
    stream that a norm of it reads: both application by application."""
    block = network.layers[-1]
    entered: list[torch.Tensor] = []
    streams: list[torch.Tensor] = []
    matrix = block.get_submodule(path)
    hooks = [
        network.embed_tokens.register_forward_hook(lambda *_: states),
        matrix.register_forward_pre_hook(lambda _, given: entered.append(given[0].flatten(0, 1))),
    ]
    if norm is not None:
        hooks.append(
            block.get_submodule(norm).register_forward_pre_hook(
                lambda _, given: streams.append(given[0].flatten(0, 1))
            )
        )
    network(torch.zeros(states.shape[:2], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return entered, streams


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("path", "norm"),
    [
        ("mlp.gate_up_proj", None),
        ("self_attn.o_proj", "input_layernorm"),
        ("mlp.down_proj", "post_attention_layernorm"),
    ],
)
def test_goals_are_those_of_the_network_as_it_was(
    shape: str, path: str, norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Network(SHAPES[shape]).eval()
    name = f"layers.1.{path}.weight"
    weight = network.get_parameter(name).detach().clone()
    tokens = torch.randint(0, WIDTH_64.vocab_size, (6, 16))
    with torch.no_grad():
        there = network.embed_tokens(tokens)
        embedded = there + 0.3 * there.std() * torch.randn_like(there)
        goal, goal_streams = read_in(network, embedded, path, norm)
        entered, streams = read_in(network, there, path, norm)
    assert len(entered) == SHAPES[shape].layer_repeats
    expected = torch.zeros_like(weight)
    for i, x in enumerate(entered):
        lacking = (goal[i] - x) @ weight.T
        if norm is not None:
            lacking += goal_streams[i] - streams[i]
        expected += lacking.T @ x
    seen: list[torch.Tensor] = []
    real = gptq.towards_goal

    def watched(values: torch.Tensor, sums: gptq.Sums) -> torch.Tensor:
        assert torch.equal(values, weight)
        assert sums.tokens == tokens.numel() * SHAPES[shape].layer_repeats
        seen.append(sums.owed.clone())
        return real(values, sums)

    monkeypatch.setattr(gptq, "towards_goal", watched)
    gptq.gptq_blocks(network, {name: 4}, tokens, embedded)
    assert torch.allclose(seen[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_goals_begin_at_the_embedding_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = made()
    tokens = torch.randint(0, WIDTH_64.vocab_size, (4, 8))
    expected = network.embed_tokens(tokens).detach().clone()
    given: list[torch.Tensor] = []

    def blocks(network, bits, tokens, embedded, progress):
        given.append(embedded)
        return {}

    monkeypatch.setattr("mobilellm.quantize.methods.gptq_blocks", blocks)
    quantized_network(network, "int4", "gptq", calibration=tokens)
    assert torch.equal(given[0], expected)
    assert not torch.equal(network.embed_tokens(tokens), expected)


def test_rows_that_later_applications_leave_out_have_the_moments_of_the_first() -> None:
    torch.manual_seed(0)
    shape = SHAPES["sharing first"]
    network = Network(shape).eval()
    block = network.layers[0]
    count = shape.num_attention_heads * shape.head_dim
    matrix = block.self_attn.qkv_proj
    goal, x = torch.randn(3, 2, 5, 64), torch.randn(3, 2, 5, 64)
    observed = gptq._Observed(block, "self_attn.qkv_proj")
    readings = gptq.Readings(
        inputs={"self_attn.qkv_proj": [part.flatten(0, 1) for part in goal]}, streams={}
    )
    with torch.no_grad(), observed.beside(readings):
        module = block.self_attn.qkv_proj
        assert torch.equal(module(x[0]), matrix(x[0]))
        assert torch.equal(module.first(x[1], count), matrix.first(x[1], count))
        with pytest.raises(gptq.ReachedError):  # nothing behind its last application is wanted
            module.first(x[2], count)
    assert block.self_attn.qkv_proj is matrix
    with torch.no_grad():
        found = observed.fitted(4)
        first, goals = x.flatten(1, 2), goal.flatten(1, 2)
        weight = matrix.weight

        def fitted(rows: slice, applications: slice):
            given = first[applications].flatten(0, 1)
            sums = gptq.Sums(len(weight[rows]), 64)
            sums.add(given, (goals[applications].flatten(0, 1) - given) @ weight[rows].T)
            changed = gptq.towards_goal(weight[rows], sums)
            return gptq_grid(changed, 4, sums.moments).dequantized()

        upper = fitted(slice(0, count), slice(0, 3))
        lower = fitted(slice(count, None), slice(0, 1))
    same = (found.dequantized() - torch.cat((upper, lower))).abs() < 1e-6
    assert float(same.float().mean()) > 0.99


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
