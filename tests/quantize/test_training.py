"""Quantization-aware training: what its products see is what quantizing leaves afterwards."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.golden.cases import BASE, make_data
from tests.model.shapes import WIDTH_64

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import held_out
from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.schemes import SCHEMES
from mobilellm.quantize.training import fake_quantize
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.start import resume, train
from mobilellm.workflows.convert import convert

CONFIG = dataclasses.replace(WIDTH_64, vocab_size=97)
SHAPES = {
    "plain": CONFIG,
    "untied": dataclasses.replace(CONFIG, tie_word_embeddings=False),
    "sharing own": dataclasses.replace(CONFIG, layer_repeats=2),
    "sharing first": dataclasses.replace(CONFIG, layer_repeats=2, shared_kv="first"),
    "qk_norm": dataclasses.replace(CONFIG, qk_norm=True),
}


def drawn(config: ModelConfig) -> Network:
    torch.manual_seed(0)
    network = Network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4)
    return network


@pytest.mark.parametrize("embedding", ["int8", "float"])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_products_see_what_quantizing_leaves(shape: str, scheme: str, embedding: str) -> None:
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12))
    faked, rounded = drawn(SHAPES[shape]), drawn(SHAPES[shape])
    before = faked(ids)
    fake_quantize(faked, scheme, embedding)
    quantized_network(rounded, scheme, "round", embedding)
    assert (faked(ids) - rounded(ids)).abs().max() < 1e-5
    assert (faked(ids) - before).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_trained_through_the_rounding(scheme: str) -> None:
    network = drawn(CONFIG)
    names = [name for name, _ in network.named_parameters()]
    fake_quantize(network, scheme)
    assert [name for name, _ in network.named_parameters()] == names
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12))
    network.loss(ids[:, :-1], ids[:, 1:]).backward()
    for name, parameter in network.named_parameters():
        assert bool((parameter.grad != 0).any()), name


def test_rounded_activations_act() -> None:
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12))
    logits = []
    for scheme in ("int4", "8da4w"):
        network = drawn(CONFIG)
        fake_quantize(network, scheme)
        logits.append(network(ids).detach())
    difference = (logits[0] - logits[1]).abs()
    assert 1e-4 < difference.mean() < 0.1 * logits[0].std()


def test_a_width_that_groups_do_not_divide_is_named() -> None:
    network = Network(dataclasses.replace(CONFIG, intermediate_size=40))
    with pytest.raises(UserError, match=r"down_proj.*40 columns"):
        fake_quantize(network, "int4")


def test_a_run_trains_for_the_grid_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    settings = {key: dict(value) for key, value in BASE.items()}
    settings["data"]["path"] = str(make_data(tmp_path))
    settings["train"] |= {"checkpoint_every": 4, "keep_checkpoints": 0}
    settings["quantize"] = {"scheme": "int4"}
    recipe = Recipe.from_dict(settings)
    run = train(tmp_path / "run", recipe).run
    last = run / "checkpoints/step-00000008"
    assert json.loads((last / "mobilellm.json").read_text())["trained_for"] == {
        "scheme": "int4",
        "method": "round",
        "embedding": "int8",
    }
    # The held-out loss of the run is that of the network once it is quantized.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loaded = load(last)
    quantized_network(loaded.network, "int4", "round")
    data = TokenFolder.open(Path(recipe.data.path))
    score = held_out(loaded.network, data, sequence_length=64)
    assert rows[-1]["held_out_loss"] == pytest.approx(score.loss, rel=1e-6)
    # A file with the grid's integers computes what the training's products did.
    ids = torch.arange(40)[None]
    faked = load(last).network
    fake_quantize(faked, "int4")
    result = convert(last, tmp_path / "run.gguf", "gguf", precision="Q4_0")
    assert "int4: the grid that the model was trained for" in result.notes
    with torch.no_grad():
        difference = (load(tmp_path / "run.gguf").network(ids) - faked(ids)).abs().max()
    assert difference < 1e-4
    # Stopped after four steps and gone on with, it ends with the same bits.
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000008")
    resume(tmp_path / "again")
    for name in ("model.safetensors",):
        assert (tmp_path / "again/checkpoints/step-00000008" / name).read_bytes() == (
            last / name
        ).read_bytes()
