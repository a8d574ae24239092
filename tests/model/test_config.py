"""Configurations: the shipped sizes, and what is refused."""

from pathlib import Path

import pytest

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig, preset_names
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network

# Parameters of the published configurations, tied (the paper's Table 9, recomputed).
PUBLISHED = {
    "125M": 124_635_456,
    "350M": 345_355_200,
    "600M": 603_188_352,
    "1B": 1_005_461_760,
    "1.5B": 1_511_188_800,
    # those of MobileLLM-R1 and R1.5, as counted on their files
    "R1-140M": 140_248_512,
    "R1-360M": 359_431_168,
    "R1-950M": 949_685_760,
    "Pro-1B": 1_084_453_120,
}


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_published_sizes_have_the_published_parameters(name: str, total: int) -> None:
    assert ModelCosts.of(ModelConfig.preset(name)).parameters["total"] == total


@pytest.mark.parametrize(("name", "body"), [("1M", 1e6), ("5M", 5e6), ("15M", 15e6)])
def test_small_sizes_are_named_after_what_is_not_embedding(name: str, body: float) -> None:
    parameters = ModelCosts.of(ModelConfig.preset(name)).parameters
    assert parameters["total"] - parameters["embedding"] == pytest.approx(body, rel=0.15)


def test_presets_are_listed_smallest_first() -> None:
    assert preset_names() == [
        "1M",
        "5M",
        "15M",
        "125M",
        "125M-LS",
        "R1-140M",
        "350M",
        "350M-LS",
        "R1-360M",
        "600M",
        "R1-950M",
        "1B",
        "Pro-1B",
        "1.5B",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"layer_repeats": 2},
        {"layer_repeats": 3, "shared_kv": "first"},
    ],
)
def test_counted_parameters_are_those_of_the_network(changes: dict) -> None:
    config = ModelConfig.preset("1M", vocab_size=64, **changes)
    assert ModelCosts.of(config).parameters["total"] == sum(
        p.numel() for p in Network(config).parameters()
    )


def test_flops_conventions_differ_by_1_57_at_125m() -> None:
    flops = ModelCosts.of(ModelConfig.preset("125M")).flops_per_token(2048)
    assert flops["six_n"] == 6 * PUBLISHED["125M"]
    assert flops["palm"] / flops["six_n"] == pytest.approx(1.57, abs=0.005)


def test_applied_parameters_equal_counted_multiplications() -> None:
    """The FLOPs of a forward pass, counted by torch, are twice the applied matrices' parameters a
    token."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({}, {"layer_repeats": 2}, {"layer_repeats": 2, "shared_kv": "first"}):
        config = ModelConfig.preset("1M", vocab_size=64, **changes)
        network, numbers = Network(config), ModelCosts.of(config)
        ids = torch.zeros(1, 8, dtype=torch.long)
        with FlopCounterMode(
            display=False
        ) as counter:  # with gradients: oneDNN's product is not among the counted
            network(ids)
        attention = sum(
            n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op)
        )
        norms = numbers.executed_layers * 2 * config.hidden_size + config.hidden_size
        assert counter.get_total_flops() - attention == 2 * 8 * (numbers.applied_parameters - norms)


def test_kv_cache_bytes() -> None:
    own, first = (
        ModelConfig.preset("125M", layer_repeats=2, shared_kv=kind) for kind in ("own", "first")
    )
    assert (
        ModelCosts.of(ModelConfig.preset("125M")).kv_cache_bytes_per_token() == 2 * 30 * 3 * 64 * 2
    )
    assert (
        ModelCosts.of(own).kv_cache_bytes_per_token()
        == 2 * ModelCosts.of(first).kv_cache_bytes_per_token()
    )


def test_round_trip_through_config_json(tmp_path: Path) -> None:
    from mobilellm.files import write_json

    for name in preset_names():
        config = ModelConfig.preset(name)
        write_json(tmp_path / "config.json", config.to_dict())
        assert ModelConfig.read(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hiden_size": 64}, ["'hiden_size'", "did you mean 'hidden_size'"]),
        ({"hidden_size": 130, "head_dim": 0}, ["hidden_size 130 does not divide", "128"]),
        ({"num_key_value_heads": 3}, ["does not divide by num_key_value_heads 3", "1, 2, 4"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu' is not supported"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"vocab_size": 10**9}, ["vocab_size = 1000000000"]),
        ({"num_hidden_layers": "six"}, ["num_hidden_layers = 'six'"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"eos_token_id": 64}, ["eos_token_id = 64", "vocabulary of 64"]),
        ({"rope_scaling": "yes"}, ["rope_scaling"]),
        ({"shared_kv": "last"}, ["'last'", "first"]),
        ({"layer_order": "revers"}, ["'revers'", "did you mean 'reverse'"]),
        ({"layer_order": "all_over", "shared_kv": "first"}, ["of another depth", "immediate"]),
    ],
)
def test_bad_configurations_are_refused_in_one_line(changes: dict, words: list[str]) -> None:
    values = ModelConfig.preset("1M").to_dict() | {"vocab_size": 64} | changes
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(values, "x.json")
    assert "\n" not in str(caught.value)
    for word in ["x.json", *words]:
        assert word in str(caught.value)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean '125M'"):
        ModelConfig.preset("124M")
