"""float32 products by other libraries: the same numbers, where they are asked for, chosen by
measuring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mobilellm.distributed import step_kernels as module
from mobilellm.distributed.parallel import Parallel
from mobilellm.distributed.step_kernels import step_kernels
from mobilellm.distributed.world import World
from mobilellm.errors import UserError
from mobilellm.hardware.probes import compiler_works
from mobilellm.kernels import bf16x6, products
from mobilellm.kernels.products import (
    Products,
    fastest_products,
    onednn_linear,
    products_fault,
    using,
)
from mobilellm.model import loss
from mobilellm.model.config import ModelConfig
from mobilellm.model.linear import linear
from mobilellm.model.loss import linear_cross_entropy
from mobilellm.model.network import Network
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.resolve import resolve_products

pytestmark = pytest.mark.skipif(onednn_linear() is None, reason="no oneDNN here")
OTHERS: tuple[Products, ...] = ("mixed", "onednn", "bf16x6")
KINDS = [kind for kind in OTHERS if not products_fault(kind)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7, 24, 40), (2, 65, 40, 24), (1, 8, 8)])
def test_value_and_gradients_are_those_of_torch(kind: Products, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *rows, inputs, outputs = shape
    x, weight = torch.randn(*rows, inputs), torch.randn(outputs, inputs)
    for turned in (False, True):  # an input and a gradient that do not lie in order
        if turned:
            x = torch.randn(inputs, *rows).movedim(0, -1)
        a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
        grad = torch.randn(outputs, *rows).movedim(0, -1)
        with using(kind):
            found = linear(a, b)
        mine = torch.autograd.grad(found, (a, b), grad)
        expected = F.linear(a, b)
        theirs = torch.autograd.grad(expected, (a, b), grad)
        for one, other in zip((found, *mine), (expected, *theirs), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_is_computed() -> None:
    x, weight = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    with using("onednn"):
        (gradient,) = torch.autograd.grad(linear(x, weight).sum(), (weight,))
    torch.testing.assert_close(gradient, x.sum(0).expand(6, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_sound(kind: str) -> None:
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    torch.library.opcheck(products._product, (x, weight, kind))


def test_other_types_and_autocast_keep_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    real = products._product
    monkeypatch.setattr(products, "_product", lambda *given: called.append(1) or real(*given))
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    linear(x, weight)
    with using("onednn"):
        linear(x.double(), weight.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        assert not called
        linear(x, weight)
    assert len(called) == 1
    linear(x, weight)
    assert len(called) == 1


@pytest.mark.parametrize("compiled", ["off", "block"])
def test_a_step_has_the_gradients_of_torchs_products(compiled: str) -> None:
    if compiled == "block" and not compiler_works():
        pytest.skip("no compiler here")
    torch.manual_seed(0)
    config = ModelConfig.preset("1M", vocab_size=300)
    ids = torch.randint(0, 300, (2, 65))
    gradients = {}
    weights: dict[str, torch.Tensor] = {}
    for kind in ("torch", *KINDS):
        network = Network(config)
        weights = weights or {n: t.clone() for n, t in network.state_dict().items()}
        network.load_state_dict(weights)
        recipe = Recipe().replace("train", precision="fp32", compile="off", products=kind)
        if kind != "torch":
            recipe = recipe.replace("train", compile=compiled)
        parallel = Parallel(network, recipe, World(device=torch.device("cpu")))
        parallel(ids[:, :-1], ids[:, 1:]).backward()
        gradients[kind] = torch.cat([p.grad.flatten() for p in network.parameters()])
    scale = gradients["torch"].abs().max()
    for kind in KINDS:
        apart = (gradients[kind] - gradients["torch"]).abs().max()
        assert 0 < apart < 1e-5 * scale, (kind, apart)


def test_the_fastest_kind_wins_and_torch_when_it_hardly_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(products, "_remembered", lambda _: None)
    monkeypatch.setattr(products, "_remember", lambda *_: None)
    large = (2048, 256, 512)
    cases = [
        ((2.0, 1.5, 1.0, 1.4), "onednn"),
        ((2.0, 1.0, 1.5, 1.4), "mixed"),
        ((2.0, 1.3, 1.5, 1.2), "bf16x6"),
        ((1.0, 0.99, 1.5, 0.98), "torch"),
    ]
    for number, (seconds, expected) in enumerate(cases):
        named = dict(zip(("torch", "mixed", "onednn", "bf16x6"), seconds, strict=True))
        monkeypatch.setattr(products, "_measure", lambda *_, found=named: found)
        assert fastest_products([large, (2048, 256, 512 + number)]) == expected
    # So little work is not worth a choice that may differ from one process to the next.
    monkeypatch.setattr(products, "_measure", lambda *_: pytest.fail("measured"))
    assert fastest_products([(64, 64, 64)]) == "torch"


def test_each_kind_that_there_is_is_measured() -> None:
    found = products._measure(64, 96, 128)
    assert set(found) == {"torch", *KINDS}
    assert all(0 < seconds < 1 for seconds in found.values())


def test_what_was_measured_once_is_remembered_for_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    products._fastest.cache_clear()
    named = {"torch": 2.0, "mixed": 1.0, "onednn": 1.5}
    monkeypatch.setattr(products, "_measure", lambda *_: named)
    assert fastest_products([(2048, 256, 640)]) == "mixed"
    products._fastest.cache_clear()  # as another process begins
    named = {"torch": 1.0, "mixed": 2.0, "onednn": 2.0}
    assert fastest_products([(2048, 256, 640)]) == "mixed"
    assert fastest_products([(2048, 256, 768)]) == "torch"
    products._fastest.cache_clear()


def test_bf16_and_given_kinds_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_measure", lambda *_: pytest.fail("measured"))
    config, cpu = ModelConfig.preset("5M", vocab_size=1024), torch.device("cpu")
    recipe = Recipe()
    for given, expected in (
        ({"precision": "bf16"}, "torch" if products_fault("amx") else "amx"),
        ({"precision": "bf16", "products": "torch"}, "torch"),
        ({"precision": "fp32", "products": "onednn"}, "onednn"),
    ):
        assert resolve_products(recipe.replace("train", **given), config, cpu, 1) == expected


def test_a_kind_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, cpu = Recipe().replace("train", products="bf16x6"), torch.device("cpu")
    monkeypatch.setattr(bf16x6, "fault", lambda: "this processor has no AMX")
    with pytest.raises(UserError, match=r'train\.products = "bf16x6": this processor has no AMX'):
        step_kernels(recipe.replace("train", precision="fp32"), cpu)
    # Those of the other precision are not meant, and a GPU's are torch's own.
    for given, device in (
        (recipe.replace("train", products="amx", precision="fp32"), cpu),
        (recipe.replace("train", precision="bf16"), cpu),
        (recipe.replace("train", products="torch"), cpu),
        (recipe.replace("train", products="auto"), cpu),
        (recipe.replace("train", precision="fp32"), torch.device("cuda")),
    ):
        assert step_kernels(given, device).products == "torch"
    with pytest.raises(UserError, match=r'train\.products = "amx": this processor has no AMX'):
        step_kernels(recipe.replace("train", products="amx", precision="bf16"), cpu)


def test_a_compiler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, cpu = Recipe().replace("train", compile="block"), torch.device("cpu")
    monkeypatch.setattr(module, "compiler_works", lambda device: False)
    with pytest.raises(UserError, match=r'train\.compile = "block": no compiler works here'):
        step_kernels(recipe, cpu)
    assert not step_kernels(recipe.replace("train", compile="off"), cpu).compiled
    monkeypatch.setattr(module, "compiler_works", lambda device: True)
    assert step_kernels(recipe, cpu).compiled


@pytest.mark.skipif("bf16x6" not in KINDS, reason="no AMX here")
def test_the_output_layer_is_of_the_kind_too(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 48), torch.randn(300, 48)
    targets, found, called = torch.randint(300, (40,)), [], []
    real = bf16x6.multiply
    monkeypatch.setattr(bf16x6, "multiply", lambda *a, **k: called.append(1) or real(*a, **k))
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", 300 * 16)  # three chunks, whose gradients add up
    kinds: tuple[Products, ...] = ("torch", "bf16x6")
    for kind in kinds:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with using(kind):
            value = linear_cross_entropy(h, w, targets)
        value.backward()
        found.append((value, h.grad, w.grad))
    assert len(called) == 9
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
