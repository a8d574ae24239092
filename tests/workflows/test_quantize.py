"""Models quantized on disk: what is written, recorded, measured and refused."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load, source_hash
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.quantized import Quantized
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows import quantize as module
from mobilellm.workflows.convert import convert
from mobilellm.workflows.quantize import quantize, stored_bytes, table


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:50_000]], 320)


@pytest.fixture
def model(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    return checkpoint(tmp_path / "model", network(), tokenizer)


@pytest.fixture
def text(tmp_path: Path, sample_text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text[:6_000])
    return path


@pytest.mark.parametrize("scheme", ["int4", "8da4w", "int8", "w8a8"])
def test_a_quantized_model_is_a_checkpoint_on_the_grid(
    tmp_path: Path, model: Path, scheme: str
) -> None:
    result = quantize(model, tmp_path / "out", scheme=scheme)
    found = load(tmp_path / "out")
    expected = load(model).network
    quantized = quantized_network(expected, scheme, "search")
    for (name, ours), theirs in zip(
        found.network.named_parameters(), expected.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert found.quantized is not None
    assert (found.quantized.scheme, found.quantized.method) == (scheme, "search")
    assert set(found.quantized.weights) == set(quantized.weights)
    facts = found.quantized.facts
    assert facts["source_sha256"] == result.source_sha256 == source_hash(model)
    assert facts["calibration"] is None
    assert found.origin["settings"]["scheme"] == scheme
    assert result.before is None is result.after


def test_gptq_records_its_text_and_scores_the_other_half(
    tmp_path: Path, model: Path, text: Path, tokenizer: Tokenizer
) -> None:
    result = quantize(model, tmp_path / "out", method="gptq", text=text)
    ids = tokenizer.encode(text.read_text())
    assert result.calibration == {
        "text": "text.txt",
        "sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens": len(ids) // 2 // 128 * 128,
        "sequences": len(ids) // 2 // 128,
    }
    found = load(tmp_path / "out").quantized
    assert found is not None
    assert found.facts["calibration"] == result.calibration
    assert result.before is not None
    assert result.after is not None
    assert result.before.tokens == len(ids) - len(ids) // 2 - 1
    # The loss is that of the part scored, by the definition.
    part = torch.tensor(ids[len(ids) // 2 :][:100])
    short = quantize(model, tmp_path / "short", text=text, calibration=text, max_tokens=100)
    assert short.before is not None
    with torch.no_grad():
        logits = load(model).network(torch.tensor(ids[:100])[None])[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:100]))
    assert short.before.loss == pytest.approx(float(loss), rel=1e-4)
    assert len(part) == 100


def test_what_a_model_was_trained_for_is_the_default(tmp_path: Path, model: Path) -> None:
    trained = {"scheme": "8da4w", "method": "round", "embedding": "float"}
    (model / "mobilellm.json").write_text(json.dumps({"trained_for": trained}))
    result = quantize(model, tmp_path / "out")
    assert (result.scheme, result.method, result.embedding) == ("8da4w", "round", "float")
    other = quantize(model, tmp_path / "other", scheme="int8")
    assert (other.method, other.embedding) == ("search", "int8")


def test_activations_are_rounded_wherever_the_model_runs(
    tmp_path: Path, model: Path, text: Path
) -> None:
    from mobilellm.runtimes.ours import RUNTIME

    losses = {}
    for scheme in ("int8", "w8a8"):
        result = quantize(model, tmp_path / scheme, scheme=scheme, text=text)
        assert result.after is not None
        losses[scheme] = result.after.loss
    assert losses["int8"] != losses["w8a8"]
    logits = {}
    for scheme in losses:
        logits[scheme] = RUNTIME.open(tmp_path / scheme, None, None).feed([5, 6, 7])
    assert 0 < abs(logits["int8"] - logits["w8a8"]).max() < 0.5 * logits["int8"].std()
    # What is written elsewhere is the network itself.
    convert(tmp_path / "w8a8", tmp_path / "plain", "mobilellm")
    assert load(tmp_path / "plain").quantized is not None


@pytest.mark.parametrize(("scheme", "expected"), [("int4", "Q4_0"), ("w8a8", "Q8_0")])
def test_convert_takes_the_exact_number_type(
    tmp_path: Path, model: Path, scheme: str, expected: str
) -> None:
    quantize(model, tmp_path / "out", scheme=scheme)
    result = convert(tmp_path / "out", tmp_path / "out.gguf", "gguf")
    assert result.precision == expected
    assert result.largest_difference == 0


@pytest.mark.parametrize("kind", ["own", "first"])
def test_the_table_has_every_way_and_leaves_the_model_alone(
    tmp_path: Path, tokenizer: Tokenizer, text: Path, kind: str
) -> None:
    drawn = network(layer_repeats=2, shared_kv=kind)
    model = checkpoint(tmp_path / kind, drawn, tokenizer)
    ready: list[module.Row] = []
    rows = table(
        model,
        text,
        tasks=lambda measured, with_: {"layers": float(len(measured.layers))},
        max_tokens=200,
        ready=ready.append,
    )
    assert rows == ready
    assert [row.scheme for row in rows[:2]] == ["fp32", "bf16"]
    kinds = {(row.scheme, row.method, row.embedding) for row in rows[2:]}
    assert len(kinds) == len(rows) - 2 == 4 * 3 * 2
    by = {(row.scheme, row.method, row.embedding): row for row in rows}
    assert by["bf16", "", "float"].bytes * 2 == rows[0].bytes
    assert rows[0].ratio == 1
    for row in rows:
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.tasks == {"layers": 2.0}
        assert row.ratio == pytest.approx(row.perplexity / rows[0].perplexity)
    # Each row is what the model scores once it is written that way.
    for scheme, method in (("int4", "round"), ("w8a8", "search")):
        written = quantize(
            model,
            tmp_path / f"{scheme}-{kind}",
            scheme=scheme,
            method=method,
            text=text,
            calibration=text,
            max_tokens=200,
        )
        assert written.bytes_after == by[scheme, method, "int8"].bytes
    whole = table(
        model, text, calibration=text, schemes=["w8a8"], methods=["search"], max_tokens=200
    )
    assert written.after is not None
    assert whole[2].loss == pytest.approx(written.after.loss, rel=1e-6)
    assert whole[0].loss == pytest.approx(written.before.loss, rel=1e-6)


def test_stored_bytes_are_those_of_integers_and_scales() -> None:
    drawn = network()
    quantized = quantized_network(drawn, "int4", "round")
    scales = sum(weight.scales.numel() for weight in quantized.weights.values())
    integers = sum(
        weight.integers.numel() * weight.bits // 8 for weight in quantized.weights.values()
    )
    norms = sum(p.numel() for p in drawn.parameters() if p.ndim == 1)
    assert stored_bytes(drawn, quantized) == integers + 2 * scales + 2 * norms


def test_refusals_leave_nothing(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "once")
    with pytest.raises(UserError, match=r"is quantized already \(int4 by search\)"):
        quantize(tmp_path / "once", tmp_path / "twice")
    with pytest.raises(UserError, match="exists already"):
        quantize(model, tmp_path / "once")
    with pytest.raises(UserError, match="gptq is calibrated on a text"):
        quantize(model, tmp_path / "none", method="gptq")
    with pytest.raises(UserError, match="no such file"):
        quantize(model, tmp_path / "none", text=tmp_path / "missing.txt")
    short = tmp_path / "short.txt"
    short.write_text("a")
    with pytest.raises(UserError, match="too short to score"):
        quantize(model, tmp_path / "none", text=short)
    with pytest.raises(UserError, match="int3"):
        table(model, text, schemes=["int3"])

    def stopped(self: Quantized, *given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Quantized, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "once", "short.txt", "text.txt"]


def test_weights_that_left_the_grid_are_not_written(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.quantized_network

    def wrong(*given: object) -> Quantized:
        found = real(*given)
        weights = {
            name: dataclasses.replace(weight, scales=weight.scales * 2)
            for name, weight in found.weights.items()
        }
        return dataclasses.replace(found, weights=weights)

    monkeypatch.setattr(module, "quantized_network", wrong)
    with pytest.raises(UserError, match="do not lie on the grid"):
        quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
