"""The plan against the original's stated training times, and the memory estimate against what was
really held."""

import json

import pytest
import torch

from mobilellm.cli import main
from mobilellm.errors import UserError
from mobilellm.hardware.devices import DEVICES, recognize
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.optimizers.optimizer import OPTIMIZERS, build
from mobilellm.plan.batching import Batching
from mobilellm.plan.memory import estimate
from mobilellm.plan.run import plan_run
from mobilellm.recipe.recipe import OptimizerSection

from .tracked import Tracked

# The original README: days for 1T tokens on 32 A100-80G.
DAYS = {"125M": 3, "350M": 6, "600M": 8, "1B": 12, "1.5B": 18}


@pytest.mark.parametrize("model", DAYS)
def test_the_originals_training_times(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "plan",
                "--model",
                model,
                "--tokens",
                "1e12",
                "--gpus",
                "32",
                "--device",
                "a100-80g",
                "--json",
            ]
        )
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["days"] == pytest.approx(DAYS[model], rel=0.2)
    assert plan["fits"]
    assert plan["steps"] == 476_838
    assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 32)
    assert plan["energy_kwh"] == pytest.approx(plan["gpu_hours"] * 0.4)


def test_a_plan_in_words_and_the_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm.train.resolve.compiler_works", lambda _: False)
    for arguments, words in (
        (
            ["--price-per-gpu-hour", "2"],
            ["0.9 x width", "device hours", "cost", "fits", "datasheet"],
        ),
        (["--model", "1.5B", "--device", "rtx-3090", "--micro-batch-size", "32"], ["DOES NOT FIT"]),
        (["--device", "list"], list(DEVICES)),
        (
            ["--model", "1M", "--measure", "--sequence-length", "64", "--tokens", "1e6"],
            ["measured here", "step"],
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        out = capsys.readouterr().out
        assert ended.value.code == 0
        assert all(word in out for word in words), out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_name": "a100-80gb"}, "did you mean 'a100-80g'"),
        ({"count": 3}, "use 2 or 4 processes"),
        ({"tokens": 0}, "0 tokens"),
        ({"mfu": 2.0}, "mfu = 2.0"),
        ({"batch_tokens": 1000}, "does not divide by sequence_length"),
    ],
)
def test_plans_that_cannot_be_are_one_line(changes: dict, words: str) -> None:
    values = {"tokens": 1e12, "device_name": "a100-80g", "count": 32} | changes
    with pytest.raises(UserError, match=words):
        plan_run(ModelConfig.preset("125M"), **values)


def test_devices_are_recognized_by_torchs_names() -> None:
    for name, key in (
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("NVIDIA A100 80GB PCIe", "a100-80g-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA H200", "h200"),
    ):  # fmt: skip
        assert recognize(name) is DEVICES[key]
    assert recognize("Quadro P2000") is None


@pytest.mark.parametrize(
    ("preset", "length", "rows", "changes"),
    [
        ("1M", 256, 8, {"vocab_size": 500}),
        ("1M", 128, 2, {"vocab_size": 32000}),
        pytest.param("5M", 256, 8, {}, marks=pytest.mark.long),
        pytest.param("5M", 256, 4, {"layer_repeats": 2}, marks=pytest.mark.long),
        pytest.param(
            "5M", 256, 4, {"layer_repeats": 2, "shared_kv": "first"}, marks=pytest.mark.long
        ),
        pytest.param("5M", 256, 4, {"qk_norm": True}, marks=pytest.mark.long),
        pytest.param("15M", 512, 4, {}, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("precision", list(Precision), ids=str)
@pytest.mark.parametrize(("optimizer", "passes"), [("adamw", 1), ("adamw", 2), ("muon", 1)])
def test_memory_is_what_was_held(
    preset: str,
    length: int,
    rows: int,
    changes: dict,
    precision: Precision,
    optimizer: str,
    passes: int,
) -> None:
    config = ModelConfig.preset(preset, **changes)
    network = Network(config)
    optimizers = build(network, OptimizerSection(name=optimizer), precision)
    ids = torch.zeros(rows, length, dtype=torch.long)
    held = Tracked()
    for parameter in network.parameters():
        held.add(parameter)
    with held:
        for _ in range(2):
            for _ in range(passes):
                with precision.autocast(torch.device("cpu")):
                    loss = network.loss(ids, ids)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
    batching = Batching.of(
        sequence_length=length, batch_tokens=passes * rows * length, micro_batch_size=rows
    )
    expected = estimate(
        config, batching, precision=precision, optimizer=OPTIMIZERS[optimizer].costs
    )
    assert expected.peak == pytest.approx(held.peak, rel=0.15)
