"""muP and CompleteP: the table, and that activations move alike at every width and depth."""

import math
from pathlib import Path

import pytest
import torch

from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network, initialize
from mobilellm.model.precision import Precision
from mobilellm.optimizers.optimizer import build
from mobilellm.optimizers.transfer import scale_initial, transfer_factors
from mobilellm.recipe.recipe import ModelSection, OptimizerSection, Recipe, TransferSection
from mobilellm.train.start import train

VOCABULARY, STEPS, BASE_WIDTH, BASE_LAYERS = 128, 4, 32, 2


def shape(width: int, layers: int, repeats: int = 1) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        max_position_embeddings=64,
        layer_repeats=repeats,
    )


def settings(kind: str, name: str = "adamw", residual: str = "normal") -> Recipe:
    rate = {"adamw": 5e-3, "muon": 1e-2}[name]
    return Recipe(
        model=ModelSection(initial_residual=residual),  # type: ignore[arg-type]
        optimizer=OptimizerSection(name=name, learning_rate=rate, eps=1e-15),  # type: ignore[arg-type]
        transfer=TransferSection(  # type: ignore[arg-type]
            kind=kind, base_width=BASE_WIDTH, base_layers=BASE_LAYERS
        ),
    )


def made(config: ModelConfig, given: Recipe, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network(config, initialized=False)
    initialize(network, zero_residual=given.model.initial_residual == "zero")
    scale_initial(network, transfer_factors(network, given))
    return network


def moved(config: ModelConfig, given: Recipe, seed: int) -> tuple[float, float]:
    """Root mean square by which a few steps move the residual stream and the logits."""
    network = made(config, given, seed)
    table = transfer_factors(network, given)
    optimizers = build(network, given.optimizer, Precision.FP32, 1.0, table)
    ids = torch.randint(VOCABULARY, (4, 33), generator=torch.Generator().manual_seed(100 + seed))
    streams: list[torch.Tensor] = []
    hook = network.layers[-1].register_forward_hook(lambda *call: streams.append(call[-1][0]))
    with torch.no_grad():
        before = network(ids[:, :-1])
    for _ in range(STEPS):
        network.loss(ids[:, :-1], ids[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        after = network(ids[:, :-1])
    hook.remove()
    change = streams[-1] - streams[0]
    return change.pow(2).mean().sqrt().item(), (after - before).pow(2).mean().sqrt().item()


def slopes(configs: list[ModelConfig], sizes: list[int], given: Recipe) -> tuple[float, float]:
    """By which power of the size the two movements grow, by least squares over seeds."""
    x = torch.tensor([math.log(size) for size in sizes])
    x = x - x.mean()
    rows = []
    for config in configs:
        found = torch.tensor([moved(config, given, seed) for seed in range(3)])
        rows.append(found.log().mean(0))
    y = torch.stack(rows)
    stream, logits = ((x[:, None] * y).sum(0) / x.square().sum()).tolist()
    return stream, logits


WIDTHS = [32, 64, 128, 256]
DEPTHS = [2, 4, 8, 16]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_activations_move_alike_at_every_width(name: str) -> None:
    """The coordinate check: without the table what a step does grows with the width."""
    configs = [shape(width, 2) for width in WIDTHS]
    plain = slopes(configs, WIDTHS, settings("", name))
    scaled = slopes(configs, WIDTHS, settings("mup", name))
    assert max(plain) > 0.3
    assert max(map(abs, scaled)) < 0.15, scaled


def test_activations_move_alike_at_every_depth() -> None:
    configs = [shape(64, layers) for layers in DEPTHS]
    width_alone = slopes(configs, DEPTHS, settings("mup"))
    both = slopes(configs, DEPTHS, settings("completep"))
    assert max(width_alone) > 0.3
    assert max(map(abs, both)) < 0.15, both


def test_the_table() -> None:
    network = Network(shape(4 * BASE_WIDTH, 3 * BASE_LAYERS))
    table = transfer_factors(network, settings("completep"))
    rows = {
        "embed_tokens.weight": (1, 1, 1),
        "layers.5.input_layernorm.weight": (1, 1, 1),
        "layers.5.self_attn.qkv_proj.weight": (1 / 2, 1 / 4, 4),
        "layers.5.mlp.gate_up_proj.weight": (1 / 2, 1 / 4, 4),
        "layers.0.self_attn.o_proj.weight": (1 / 6, 1 / 12, 12),
        "layers.0.mlp.down_proj.weight": (1 / 6, 1 / 12, 12),
        "norm.weight": (1 / 4, 1 / 4, 4),
    }
    for name, wanted in rows.items():
        found = table[name]
        assert (found.initial, found.learning_rate, found.weight_decay) == pytest.approx(wanted)
    shared = Network(shape(4 * BASE_WIDTH, BASE_LAYERS, repeats=3))
    key = "layers.0.mlp.down_proj.weight"
    assert transfer_factors(shared, settings("completep"))[key] == table[key]
    muon = transfer_factors(network, settings("completep", "muon"))[key]
    assert muon.learning_rate == pytest.approx(1 / 6)
    zero = transfer_factors(network, settings("mup", residual="zero"))
    assert zero["layers.0.mlp.gate_up_proj.weight"].initial == 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_group_has_its_rate_and_the_product_with_its_decay_stays(name: str) -> None:
    given = settings("completep", name)
    network = Network(shape(4 * BASE_WIDTH, 3 * BASE_LAYERS))
    table = transfer_factors(network, given)
    names = {id(p): key for key, p in network.named_parameters()}
    seen = []
    for scaled, plain in zip(
        build(network, given.optimizer, Precision.FP32, 2.0, table),
        build(network, given.optimizer, Precision.FP32),
        strict=True,
    ):
        rates = {
            id(p): (g["lr"], g["weight_decay"]) for g in plain.param_groups for p in g["params"]
        }
        for group in scaled.param_groups:
            for parameter in group["params"]:
                rate, decay = rates[id(parameter)]
                wanted = rate * table[names[id(parameter)]].learning_rate
                assert group["lr"] == pytest.approx(wanted)
                assert group["peak_lr"] == pytest.approx(2 * wanted)
                assert group["lr"] * group["weight_decay"] == pytest.approx(rate * decay)
                seen.append(names[id(parameter)])
    assert sorted(seen) == sorted(table)


def test_without_a_kind_nothing_is_scaled() -> None:
    given = settings("")
    network = made(shape(64, 2), given)
    torch.manual_seed(0)
    assert torch.equal(network.norm.weight, torch.ones(64))
    assert all(f.initial == f.learning_rate == 1 for f in transfer_factors(network, given).values())


def test_a_run_with_it_leaves_a_plain_checkpoint(tmp_path: Path, recipe: Recipe) -> None:
    given = recipe.replace("train", steps=3).replace("transfer", kind="mup", base_width=64)
    loaded = load(train(tmp_path / "run", given).checkpoint)
    assert loaded.config.to_dict()["model_type"] == "llama"
    assert loaded.network.norm.weight.mean().item() == pytest.approx(0.5, abs=0.1)
