"""The table of tensor names says what the network has, and what the gguf package says."""

import gguf
import pytest
import torch
from tests.interop.networks import network

from mobilellm.families import names
from mobilellm.model.weights import shapes


def test_every_tensor_of_a_checkpoint_has_the_names_that_gguf_gives_it() -> None:
    config = network(tie_word_embeddings=False).config
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in shapes(config):
        assert names.gguf_name(name) == known.get_name(name, try_suffixes=(".weight",)), name


def test_every_tensor_has_a_name_in_llama2c() -> None:
    config = network(tie_word_embeddings=False, num_hidden_layers=1).config
    block = {f"model.layers.0.{hf}.weight" for hf in names.LLAMA2C_BLOCK.values()}
    outside = {f"{hf}.weight" for hf in names.LLAMA2C_OUTSIDE.values()}
    assert block | outside == set(shapes(config))


@pytest.mark.parametrize("heads", [1, 3])
def test_swapping_pairs_is_its_own_inverse_and_follows_the_definition(heads: int) -> None:
    half = 4
    rows = torch.arange(heads * 2 * half)[:, None].float().repeat(1, 5)
    swapped = names.swap_pairs(rows, heads, to="neighbors")
    for head in range(heads):
        for i in range(half):
            start = head * 2 * half
            pair = swapped[start + 2 * i : start + 2 * i + 2, 0].tolist()
            assert pair == [start + i, start + half + i]
    assert torch.equal(names.swap_pairs(swapped, heads, to="halves"), rows)
