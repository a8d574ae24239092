"""Optimizers and schedule against torch's own and the formulas."""

import math

import pytest
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.optimizers import muon as muon_module
from mobilellm.optimizers.cautious import CautiousAdamW
from mobilellm.optimizers.muon import Muon, orthogonalize
from mobilellm.optimizers.optimizer import build, set_learning_rate
from mobilellm.optimizers.schedule import factor as schedule
from mobilellm.recipe.recipe import OptimizerSection


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind: str) -> None:
    section = OptimizerSection(warmup_steps=10, schedule=kind, final_lr_fraction=0.1)  # type: ignore[arg-type]
    factors = [schedule(step, 110, section) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else 0.1)
    middle = schedule(10 + 33, 110, section)
    wanted = {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)),
        "linear": 0.1 + 0.9 * 2 / 3,
        "constant": 1.0,
    }
    assert middle == pytest.approx(wanted[kind])


def test_muon_equals_torchs_on_each_part() -> None:
    """torch.optim.Muon with Moonlight's scale, on parts kept as parameters of their own; it
    iterates in bfloat16."""
    torch.manual_seed(0)
    sizes = [(48, 32), (16, 32), (16, 32), (32, 64)]
    parts = [torch.randn(size) * 0.02 for size in sizes]
    stacked, plain = torch.nn.Parameter(torch.cat(parts[:3])), torch.nn.Parameter(parts[3].clone())
    separate = [torch.nn.Parameter(p.clone()) for p in parts]
    groups = [{"params": [stacked], "parts": [48, 16, 16]}, {"params": [plain]}]
    ours = Muon(groups, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    theirs = torch.optim.Muon(
        separate,
        lr=0.02,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(5):
        gradients = [torch.randn(size) for size in sizes]
        stacked.grad, plain.grad = torch.cat(gradients[:3]), gradients[3].clone()
        for parameter, gradient in zip(separate, gradients, strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    for mine, their in zip(
        [*stacked.detach().split([48, 16, 16]), plain.detach()], separate, strict=True
    ):
        moved = (their - parts[sizes.index(tuple(their.shape))]).norm()
        assert (mine - their).norm() < 0.02 * moved


def test_orthogonalized_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(
        orthogonalize(torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0)))
    )
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_decay_is_on_matrices_only_and_every_parameter_is_in_one_group() -> None:
    network = Network(ModelConfig.preset("1M", vocab_size=64, tie_word_embeddings=False))
    names = {id(p): name for name, p in network.named_parameters()}
    for kind in ("adamw", "muon", "normuon"):
        optimizers = build(network, OptimizerSection(name=kind, weight_decay=0.1), Precision.FP32)  # type: ignore[arg-type]
        seen = [names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(seen) == sorted(names.values())
        decay = {
            names[id(p)]: g["weight_decay"]
            for o in optimizers
            for g in o.param_groups
            for p in g["params"]
        }
        assert all(value == 0 for name, value in decay.items() if name.endswith("norm.weight"))
        assert all(
            value == 0.1
            for name, value in decay.items()
            if name.startswith("layers.") and "norm" not in name
        )
    set_learning_rate(optimizers, 0.5)
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {
        OptimizerSection().learning_rate / 2
    }
    set_learning_rate(optimizers, 0.5, 0.25)
    assert {g["weight_decay"] for o in optimizers for g in o.param_groups} == {0.0, 0.025}


@pytest.mark.parametrize(("kind", "decay"), [("adamw", 0.1), ("muon", 0.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_is_decayed_by_adamw_alone(kind: str, decay: float, tied: bool) -> None:
    network = Network(ModelConfig.preset("1M", vocab_size=64, tie_word_embeddings=tied))
    section = OptimizerSection(name=kind, weight_decay=0.1)  # type: ignore[arg-type]
    outside = {id(p) for p in (network.embed_tokens.weight, network.output_weight)}
    found = [
        group["weight_decay"]
        for optimizer in build(network, section, Precision.FP32)
        for group in optimizer.param_groups
        if outside & {id(p) for p in group["params"]}
    ]
    assert found == [decay]


def test_adamw_is_torchs_with_the_papers_settings() -> None:
    network = Network(ModelConfig.preset("1M", vocab_size=64))
    (optimizer,) = build(network, OptimizerSection(), Precision.FP32)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["eps"] == 1e-8


def test_normuon_is_its_paper() -> None:
    """Each part by the paper's algorithm, written out; the length of the update is that of Muon's.

    A tall matrix is orthogonalized the other way around, and its rows stay what one neuron writes.
    """
    torch.manual_seed(0)
    parts = [torch.randn(size) * 0.02 for size in ((24, 32), (8, 32))]
    tall = torch.randn(40, 16) * 0.02
    stacked, plain = torch.nn.Parameter(torch.cat(parts)), torch.nn.Parameter(tall.clone())
    groups = [{"params": [stacked], "parts": [24, 8]}, {"params": [plain]}]
    ours = Muon(groups, lr=0.02, weight_decay=0.1, row_decay=0.9)
    wanted = [*(part.clone() for part in parts), tall.clone()]
    moments = [torch.zeros_like(part) for part in wanted]
    squares = [torch.zeros(len(part), 1) for part in wanted]
    for _ in range(4):
        gradients = [torch.randn(part.shape) for part in wanted]
        gradients[0][:12] *= 50  # rows of unequal size
        stacked.grad, plain.grad = torch.cat(gradients[:2]), gradients[2].clone()
        ours.step()
        for i, gradient in enumerate(gradients):
            moments[i].lerp_(gradient, 0.05)
            direction = 0.05 * gradient + 0.95 * moments[i]
            flat = direction if len(direction) <= direction.shape[1] else direction.T
            turned = orthogonalize(flat[None])[0]
            turned = turned if flat is direction else turned.T
            squares[i] = 0.9 * squares[i] + 0.1 * turned.square().mean(1, keepdim=True)
            update = turned / squares[i].sqrt()
            update *= turned.norm() / update.norm()
            scale = 0.02 * 0.2 * max(update.shape) ** 0.5
            wanted[i] = wanted[i] * (1 - 0.02 * 0.1) - scale * update
    torch.testing.assert_close(stacked.detach(), torch.cat(wanted[:2]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(plain.detach(), wanted[2], rtol=1e-5, atol=1e-7)


def test_normuon_is_built_with_its_rows() -> None:
    network = Network(ModelConfig.preset("1M", vocab_size=64))
    for kind, row_decay in (("muon", 0.0), ("normuon", 0.8)):
        section = OptimizerSection(name=kind, betas=(0.9, 0.8))  # type: ignore[arg-type]
        first, _ = build(network, section, Precision.FP32)
        assert isinstance(first, Muon)
        assert first.row_decay == row_decay


@pytest.mark.parametrize("kind", ["adamw", "muon", "normuon"])
def test_cautious_decay_is_only_where_the_update_does_not_make_a_weight_larger(kind: str) -> None:
    """Against the same optimizer without decay: what is less there is a share of the weight."""
    torch.manual_seed(0)
    start = torch.randn(16, 24)
    gradients = [torch.randn(16, 24) for _ in range(3)]

    def made(decay: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(start.clone())
        settings = {"lr": 0.01, "weight_decay": decay}
        if kind == "adamw":
            return weight, CautiousAdamW([weight], fused=True, **settings)
        row_decay = 0.95 if kind == "normuon" else 0.0
        groups = [{"params": [weight]}]
        return weight, Muon(groups, cautious=True, row_decay=row_decay, **settings)

    (plain, undecayed), (weight, decayed) = made(0.0), made(0.5)
    for gradient in gradients:
        before = weight.detach().clone()
        plain.data.copy_(before)  # the updates depend on gradients alone
        for parameter, optimizer in ((plain, undecayed), (weight, decayed)):
            parameter.grad = gradient.clone()
            optimizer.step()
        update = plain.detach() - before
        shrinks = update * before < 0
        assert 0.2 < shrinks.float().mean() < 0.8
        wanted = before * (1 - 0.01 * 0.5 * shrinks) + update
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-5, atol=1e-6)
        assert [group["weight_decay"] for group in decayed.param_groups] == [0.5]


def test_a_step_is_skipped_as_well_where_the_host_would_have_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device's word is multiplied in: the same weights as here, where it is read."""
    found = []
    for waits in (False, True):
        monkeypatch.setattr(muon_module, "known_at_once", lambda _, waits=waits: not waits)
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(6, 4))
        optimizer = Muon([{"params": [parameter], "parts": [4, 2]}], lr=0.1)
        for bad in (False, True, False):
            parameter.grad = torch.full((6, 4), float("nan")) if bad else torch.randn(6, 4)
            before = parameter.detach().clone()
            optimizer.found_inf = torch.tensor(float(bad))
            optimizer.step()
            assert torch.equal(before, parameter) == bad
        found.append((parameter.detach(), optimizer.state[parameter]["momentum"]))
    for here, there in zip(*found, strict=True):
        assert torch.allclose(here, there, rtol=1e-5, atol=1e-6)
