"""The first weights, row by row of the table in `initialize`."""

import math

import pytest
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network, initialize

RANGE = 0.05  # no default, so that a constant in its place would show
WIDTH, HEADS_WIDTH, FFN = 64, 128, 192
# Part of the name -> standard deviation of both kinds; None is "all ones".
PLAIN = {
    "embed_tokens": RANGE,
    "lm_head": RANGE,
    "qkv_proj": RANGE,
    "gate_up_proj": RANGE,
    "o_proj": RANGE,
    "down_proj": RANGE,
    "norm": None,
}
ZERO_RESIDUAL = PLAIN | {
    "qkv_proj": 0.7 / math.sqrt(WIDTH),
    "gate_up_proj": 0.7 / math.sqrt(WIDTH),
    "o_proj": 0.0,
    "down_proj": 0.0,
}


def network() -> Network:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEADS_WIDTH // 4,
        initializer_range=RANGE,
        tie_word_embeddings=False,
        qk_norm=True,
    )
    made = Network(config, initialized=False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(math.nan)  # what is not set would stay so
    return made


@pytest.mark.parametrize(("zero_residual", "table"), [(False, PLAIN), (True, ZERO_RESIDUAL)])
def test_each_parameter_is_set_as_its_row_says(
    zero_residual: bool, table: dict[str, float | None]
) -> None:
    made = network()
    initialize(made, zero_residual, torch.Generator().manual_seed(0))
    rows = set()
    for name, parameter in made.named_parameters():
        (row,) = [row for row in table if row in name.rsplit(".", 2)[-2]]
        rows.add(row)
        std = table[row]
        if std is None:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif std == 0:
            assert not parameter.any(), name
        else:
            count = parameter.numel()
            assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(count)), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(count), name
            kurtosis = (parameter / std).pow(4).mean().item()
            assert kurtosis == pytest.approx(3, abs=50 / math.sqrt(count)), name  # normal
    assert rows == set(table)


def test_the_draw_is_the_generators() -> None:
    first, same, other = network(), network(), network()
    for made, seed in ((first, 1), (same, 1), (other, 2)):
        torch.rand(1)  # torch's own state plays no part
        initialize(made, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(first.embed_tokens.weight, same.embed_tokens.weight)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)


def test_a_network_is_initialized_plainly_from_torchs_own_state() -> None:
    expected = network()
    torch.manual_seed(5)
    made = Network(expected.config)
    torch.manual_seed(5)
    Network(expected.config, initialized=False)  # its modules draw as they are made
    initialize(expected)
    for ours, theirs in zip(made.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
