"""A feed-forward with ReLU: two matrices, trained and evaluated here, and refused elsewhere."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mobilellm import cli
from mobilellm.decoding.decoder import decoder_of
from mobilellm.errors import UserError
from mobilellm.export.targets import TARGETS
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import FeedForward, Network
from mobilellm.model.static import StaticNetwork

CONFIG = ModelConfig.preset("1M", vocab_size=64, num_hidden_layers=2, feed_forward="relu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of such a network."""
    torch.manual_seed(0)
    path = tmp_path / "relu"
    path.mkdir()
    save_checkpoint(path, Network(CONFIG), None, {})
    return path


def test_it_is_two_matrices_with_a_relu_between() -> None:
    torch.manual_seed(0)
    part = FeedForward(CONFIG)
    x = torch.randn(2, 5, CONFIG.hidden_size)
    wanted = torch.relu(x @ part.gate_up_proj.weight.T) @ part.down_proj.weight.T
    torch.testing.assert_close(part(x), wanted)
    network = Network(CONFIG)
    assert sum(p.numel() for p in network.parameters()) == ModelCosts.of(CONFIG).parameters["total"]


def test_a_checkpoint_of_it_is_read_again_and_no_llama(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert (values["model_type"], values["hidden_act"]) == ("mobilellm", "relu")
    loaded = load(folder)
    assert loaded.config == CONFIG
    torch.manual_seed(0)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded.network(ids), Network(CONFIG)(ids))
    names = {name for name in load_file(folder / "model.safetensors") if ".0.mlp." in name}
    assert names == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down")}


@pytest.mark.parametrize("to", [name for name in TARGETS if name != "mobilellm"])
def test_every_other_format_refuses_it_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", str(folder), str(tmp_path / "out"), "--to", to, "--no-verify"])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert f"{to} does not hold a feed-forward with ReLU" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_nothing_traces_or_decodes_it_as_if_it_were_swiglu() -> None:
    network = Network(CONFIG)
    assert decoder_of(network) is None
    with pytest.raises(UserError, match="for training and evaluation alone"):
        StaticNetwork(network, context=16)
    with pytest.raises(UserError, match="did you mean 'relu'"):
        ModelConfig.preset("1M", feed_forward="rel")
