"""Orders in which shared layers are applied: what the network computes, its files, and exports."""

from pathlib import Path

import pytest
import torch

from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.interop.repeats import unrolled
from mobilellm.model.cache import KVCache
from mobilellm.model.config import LayerOrder, ModelConfig
from mobilellm.model.network import Network
from mobilellm.quantize.gptq import gptq_blocks
from mobilellm.workflows.convert import convert

ORDERS: dict[tuple[LayerOrder, int], list[int]] = {
    ("immediate", 2): [0, 0, 1, 1, 2, 2],
    ("all_over", 2): [0, 1, 2, 0, 1, 2],
    ("reverse", 2): [0, 1, 2, 2, 1, 0],
    ("reverse", 3): [0, 1, 2, 2, 1, 0, 0, 1, 2],
}


def network(order: LayerOrder, repeats: int = 2) -> Network:
    torch.manual_seed(1)
    made = Network(
        ModelConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            layer_repeats=repeats,
            layer_order=order,
        )
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    return made.eval()


def ids(count: int = 12) -> torch.Tensor:
    return torch.randint(64, (1, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("case", "blocks"), ORDERS.items())
@torch.no_grad()
def test_blocks_are_applied_in_the_order_that_is_named(
    case: tuple[LayerOrder, int], blocks: list[int]
) -> None:
    made = network(*case)
    assert made.config.application_order == blocks
    called: list[int] = []
    for number, layer in enumerate(made.layers):
        layer.register_forward_hook(lambda *_, number=number: called.append(number))
    logits = made(ids())
    assert called == blocks
    assert torch.equal(unrolled(made)(ids()), logits)
    assert unrolled(made).config.to_dict()["model_type"] == "llama"


@pytest.mark.parametrize("case", ORDERS)
@torch.no_grad()
def test_a_cache_gives_the_same_logits(case: tuple[LayerOrder, int]) -> None:
    made = network(*case)
    cache = KVCache(made.config, 1, 12, like=made.norm.weight)
    parts = [made(piece, cache) for piece in ids().split([5, 1, 6], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), made(ids()), atol=1e-5)


@pytest.mark.parametrize("order", ["all_over", "reverse"])
def test_the_order_is_in_the_file_and_is_unrolled_for_others(
    tmp_path: Path, order: LayerOrder
) -> None:
    made = network(order)
    (tmp_path / "ours").mkdir()
    save_checkpoint(tmp_path / "ours", made, None, {})
    read = load(tmp_path / "ours").network
    assert read.config == made.config
    convert(tmp_path / "ours", tmp_path / "plain", to="hf")
    plain = load(tmp_path / "plain").network
    assert (plain.config.num_hidden_layers, plain.config.layer_repeats) == (6, 1)
    with torch.no_grad():
        assert torch.equal(plain(ids()), made(ids()))
        assert not torch.equal(network("immediate")(ids()), made(ids()))


def test_gptq_says_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="applies a block again after others"):
        gptq_blocks(network("all_over"), {}, ids(), torch.zeros(0))
