"""The search: the latency model on known prices, candidates at the limits, halving, bad input."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mobilellm import cli
from mobilellm.cli.plan import Plan
from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.interop.repeats import unrolled_config
from mobilellm.lab.latency import LatencyModel
from mobilellm.lab.search import Limits, candidates, name_of, rungs, sample_shapes, write_shapes
from mobilellm.lab.shapes import ShapeRule, shaped
from mobilellm.model.config import ModelConfig
from mobilellm.profiling.bytes_read import model_facts
from mobilellm.profiling.device_profile import DeviceProfile, read_profile, write_profile
from mobilellm.recipe.recipe import Recipe
from mobilellm.report.search_page import front_of

RULE = ShapeRule(head_dim=8, ffn_multiple=8)
BASE = ModelConfig.preset("1M", vocab_size=300)
# Milliseconds: a token, an applied block, a weight read, a weight applied.
PRICES = (0.5, 0.02, 3e-6, 1e-6)


def cost(config: ModelConfig) -> float:
    facts = model_facts(config)
    amounts = (1, *(facts[key] for key in ("executed_layers", "read_parameters",
                                           "applied_parameters")))  # fmt: skip
    return sum(price * amount for price, amount in zip(PRICES, amounts, strict=True))


def row(name: str, config: ModelConfig, milliseconds: float, runtime: str = "x") -> dict[str, Any]:
    figure = dict.fromkeys(("median", "lowest", "highest"), milliseconds) | {"values": []}
    facts = model_facts(config)
    return {
        "name": name, "file": name, "runtime": runtime, "runtime_version": None, "sha256": "",
        "bytes": 2 * facts["parameters"], "model": facts, "figures": {"token_ms_p50": figure},
        "bytes_per_token": None, "bandwidth_share": None, "operators": None, "error": None,
    }  # fmt: skip


def profile(off: tuple[float, ...] = (0.0,), device: str = "a phone") -> DeviceProfile:
    """Shapes with exact costs, each times 1 + one of `off` in turn."""
    rows = [
        row(f"shape {n}", shape, cost(shape) * (1 + off[n % len(off)]))
        for n, shape in enumerate(sample_shapes(BASE, RULE))
    ]
    return {
        "format": "mobilellm device profile", "format_version": 1, "made_by": "a test",
        "date": "today", "machine": {"device": device}, "settings": {}, "bandwidth": {},
        "interrupted": False, "rows": rows,
    }  # type: ignore[typeddict-item]  # fmt: skip


def test_prices_are_found_and_predict_shapes_that_were_not_measured() -> None:
    model = LatencyModel.fit(profile())
    assert list(model.prices.terms.values()) == pytest.approx((*PRICES, 0.0), rel=1e-4)
    assert model.prices.near == float("inf")
    assert model.error < 1e-6
    unseen = dataclasses.replace(BASE, num_hidden_layers=17, layer_repeats=3)
    assert model.milliseconds(unseen) == pytest.approx(cost(unseen), rel=1e-4)
    assert model.megabytes(unseen) == pytest.approx(2e-6 * model_facts(unseen)["parameters"])
    assert (model.device, model.runtime) == ("a phone", "x")


def test_weights_that_no_cache_holds_have_a_price_of_their_own() -> None:
    found = profile()
    read = sorted(r["model"]["read_parameters"] for r in found["rows"] if r["model"] is not None)
    near, price = read[len(read) // 2], 2e-4
    for each in found["rows"]:
        assert each["model"] is not None
        far = max(0, each["model"]["read_parameters"] - near)
        each["figures"]["token_ms_p50"]["median"] += price * far
    model = LatencyModel.fit(found)
    assert model.prices.near == near
    assert model.prices.terms["far_parameters"] == pytest.approx(price, rel=1e-3)
    unseen = dataclasses.replace(BASE, num_hidden_layers=40, hidden_size=256)
    far = model_facts(unseen)["read_parameters"] - near
    assert far > 0
    assert model.milliseconds(unseen) == pytest.approx(cost(unseen) + price * far, rel=1e-3)


def test_a_file_that_holds_shared_blocks_several_times_costs_as_much() -> None:
    """GGUF's llama has no blocks that are applied several times."""
    found = profile()
    shapes = [unrolled_config(shape) for shape in sample_shapes(BASE, RULE)]
    found["rows"] = [row(f"{n}", shape, cost(shape), "llama.cpp") for n, shape in enumerate(shapes)]  # type: ignore[misc]
    model = LatencyModel.fit(found)
    shared = dataclasses.replace(BASE, num_hidden_layers=11, layer_repeats=2)
    plain = dataclasses.replace(BASE, num_hidden_layers=22)
    assert model.milliseconds(shared) == pytest.approx(cost(plain), rel=1e-3)
    assert model.megabytes(shared) == model.megabytes(plain)


def test_the_error_is_that_of_files_left_out() -> None:
    model = LatencyModel.fit(profile((0.1, -0.1, 0.05)))
    assert 0.03 < model.error < 0.3
    assert model.worst >= model.error
    assert len(model.left_out) == 17
    assert min(model.prices.terms.values()) >= 0


def test_plan_says_what_the_model_will_take_on_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = profile()
    slower = [row(f"y{n}", s, 2 * cost(s), "y") for n, s in enumerate(sample_shapes(BASE, RULE))]
    two["rows"] += slower  # type: ignore[arg-type]
    write_profile(tmp_path / "phone.json", two)
    config = ModelConfig.preset("125M")
    Plan(profile=tmp_path / "phone.json", json=True).run()
    found = json.loads(capsys.readouterr().out)["on_device"]
    assert [one["runtime"] for one in found] == ["x", "y"]
    assert found[0]["milliseconds"] == pytest.approx(cost(config), rel=1e-3)
    assert found[1]["milliseconds"] == pytest.approx(2 * cost(config), rel=1e-3)
    assert found[0]["megabytes"] == pytest.approx(2e-6 * model_facts(config)["parameters"])
    Plan(profile=tmp_path / "phone.json").run()
    assert f"{cost(config):.2f} ms a token" in capsys.readouterr().out
    Plan(json=True).run()
    assert json.loads(capsys.readouterr().out)["on_device"] == []
    few = profile() | {"rows": profile()["rows"][:2]}
    write_profile(tmp_path / "few.json", few)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"few\.json: 2 different shapes"):
        Plan(profile=tmp_path / "few.json").run()


def test_a_profile_that_cannot_tell_is_refused() -> None:
    few = profile()
    few["rows"] = few["rows"][:3]
    with pytest.raises(UserError, match="3 different shapes, 4 or more are needed"):
        LatencyModel.fit(few)
    two = profile()
    two["rows"] += [row("other", BASE, 1.0, runtime="y")]  # type: ignore[list-item]
    with pytest.raises(UserError, match="has figures of x, y; choose one with --runtime"):
        LatencyModel.fit(two)
    assert LatencyModel.fit(two, "x").runtime == "x"
    with pytest.raises(UserError, match="unknown runtime 'z'"):
        LatencyModel.fit(two, "z")


def test_candidates_fit_and_lie_at_the_limits() -> None:
    model, limits = LatencyModel.fit(profile()), Limits(milliseconds=3.0, megabytes=1.0)
    found = candidates(BASE, model, limits, RULE, 9)
    assert 2 <= len(found) <= 9
    assert len({name_of(each) for each in found}) == len(found)
    for each in found:
        assert limits.used(each, model) <= 1
        wider = RULE.head_dim * (each.num_attention_heads + 1)
        group = each.num_attention_heads // each.num_key_value_heads
        rule = dataclasses.replace(RULE, query_heads_per_kv=3 if group > 1 else 1)
        assert limits.used(shaped(each, wider, rule), model) > 1
    with pytest.raises(UserError, match=r"no shape fits: the smallest takes .* ms a token"):
        candidates(BASE, model, Limits(milliseconds=0.1, megabytes=1.0), RULE, 9)


def test_a_third_of_a_rung_goes_on() -> None:
    assert [rungs(count) for count in (1, 3, 4, 9, 10, 27)] == [
        [1], [3], [4, 2], [9, 3], [10, 4, 2], [27, 9, 3],
    ]  # fmt: skip


def test_the_front_holds_what_no_other_beats_in_both() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (3.0, 2.0), (4.0, 1.0)]
    assert front_of(points) == [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)]


def test_shapes_to_profile_are_models_that_load(tmp_path: Path) -> None:
    shapes = sample_shapes(BASE, RULE)[:2]
    for path, shape in zip(write_shapes(tmp_path, shapes), shapes, strict=True):
        assert load(path).config == shape
    assert len({tuple(model_facts(s).values()) for s in sample_shapes(BASE, RULE)}) == 17


def recipe_file(folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(
        '[model]\npreset = "1M"\noverride = {max_position_embeddings = 64}\n'
        "[data]\nsequence_length = 32\n"
        '[train]\nbatch_tokens = 128\nprecision = "fp32"\n'
        "[optimizer]\nwarmup_steps = 2\n"
    )
    return path


def test_a_search_trains_less_and_less_and_writes_a_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small_data: Path, steady: None
) -> None:
    write_profile(tmp_path / "profile.json", profile())
    out = tmp_path / "out"
    arguments = [
        "search", "--device", str(tmp_path / "profile.json"), "--max-latency", "2ms",
        "--max-size", "1MB", "--data", str(small_data), "--out", str(out), "--budget", "30s",
        "--recipe", str(recipe_file(tmp_path)), "--candidates", "4", "--head-dim", "8",
        "--ffn-multiple", "8",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0
    assert [len(each["bits"]) for each in found["candidates"]] == [2, 2, 1, 1]
    assert found["steps"][1] > found["steps"][0]
    first, second = found["candidates"][:2]
    assert first["name"] == found["winner"]
    assert first["bits"][1] < second["bits"][1]
    for each in found["candidates"]:
        assert each["milliseconds"] <= 2
        assert each["megabytes"] <= 1
    recipe = Recipe.read(out / "winner.toml")
    assert (
        name_of(ModelConfig.from_dict(ModelConfig.preset("1M").to_dict() | recipe.model.override))
        == found["winner"]
    )
    page = (out / "report.html").read_text()
    assert "Bits a byte after the first rung against milliseconds" in page
    with pytest.raises(SystemExit):
        cli.main(arguments)  # everything is there: nothing is trained again
    again = capsys.readouterr()
    assert f"winner: {found['winner']}" in again.out
    assert "training" not in again.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--device": ""}, "a search needs --device"),
        ({"--max-latency": "20"}, "--max-latency '20': no number of ms; write 20ms"),
        ({"--max-size": "0MB"}, "--max-size '0MB': no number of MB"),
        ({"--max-latency": "0.01ms"}, "no shape fits"),
        ({"--candidates": "0"}, "candidates 0: must be 1 or more"),
        ({"--runtime": "llama"}, "unknown runtime 'llama'"),
        ({"--budget": "0.01s"}, "has no room for 20 steps"),
    ],
)
@pytest.mark.usefixtures("steady")
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    small_data: Path,
    changes: dict[str, str],
    words: str,
) -> None:
    write_profile(tmp_path / "profile.json", profile())
    given = {
        "--device": str(tmp_path / "profile.json"), "--max-latency": "3ms", "--max-size": "1MB",
        "--data": str(small_data), "--out": str(tmp_path / "out"), "--budget": "12s",
        "--recipe": str(recipe_file(tmp_path)), "--candidates": "2", "--head-dim": "8",
        "--ffn-multiple": "8",
    } | changes  # fmt: skip
    pairs = [word for pair in given.items() if pair[1] for word in pair]
    with pytest.raises(SystemExit) as caught:
        cli.main(["search", *pairs])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("steady")
def test_equal_latency_solves_widths_by_a_profile_of_one_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lab_file: Path, small_data: Path
) -> None:
    text = lab_file.read_text().replace('"parameters"', '"latency"')
    text = text.replace("[2, 3, 6]", "[2, 3, 4]")
    lab_file.write_text(text[: text.index("[published]")])
    steep = profile()
    for each in steep["rows"]:
        assert each["model"] is not None
        milliseconds = 1e-5 * each["model"]["read_parameters"]
        each["figures"]["token_ms_p50"] |= {"median": milliseconds}  # type: ignore[typeddict-item]
    write_profile(tmp_path / "profile.json", steep)
    arguments = ["lab", str(lab_file), "--data", str(small_data), "--out", str(tmp_path / "lab"),
                 "--seeds", "1", "--profile", str(tmp_path / "profile.json")]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--plan"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "equal time a token on the device" in out
    with pytest.raises(SystemExit):
        cli.main(arguments)
    capsys.readouterr()
    write_profile(tmp_path / "profile.json", profile(device="a watch"))
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == (
        f"mobilellm: {tmp_path / 'profile.json'}: of a watch; {tmp_path / 'lab'} was solved for "
        "a phone; choose another --out for another device\n"
    )
    assert read_profile(tmp_path / "profile.json")["machine"]["device"] == "a watch"
