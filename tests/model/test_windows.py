"""Sliding windows by layer: equal to transformers', cached and uncached, packed and alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.interop.networks import checkpoint, network
from transformers import CwmConfig, CwmForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.interop.repeats import folded, unrolled
from mobilellm.model.attention_mask import Span, document_mask
from mobilellm.model.attention_spec import FULL, AttentionSpec
from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.model.network import Network
from mobilellm.model.static import StaticNetwork
from mobilellm.workflows.convert import convert

SLIDING, ALL = "sliding_attention", "full_attention"
KINDS = [SLIDING, ALL, SLIDING]
REVERSE = {"layer_repeats": 2, "layer_order": "reverse", "layer_types": [ALL, SLIDING, SLIDING]}
IDS = torch.arange(60)[None] * 37 % 300
USED = {"use_sliding_window": True, "sliding_window": 7}
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 7,
    "tie_word_embeddings": True,
    "initializer_range": 0.15,
}


def windowed(window: int = 7, **changes) -> Network:
    values = {"num_hidden_layers": 3, "layer_types": KINDS, "sliding_window": window} | changes
    return network(**values)


def theirs(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**(SHAPE | changes), use_sliding_window=True)).eval()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return CwmForCausalLM(CwmConfig(**(SHAPE | {"rope_parameters": rope} | changes))).eval()


@pytest.mark.parametrize("kind", ["qwen3", "cwm"])
def test_losses_and_gradients_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = theirs(kind, layer_types=KINDS, eos_token_id=2, bos_token_id=1)
    model.save_pretrained(tmp_path / "m")
    ours = load(tmp_path / "m").network
    assert ours.config.layer_types == KINDS
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), model(IDS).logits, atol=1e-5, rtol=0)
    with torch.no_grad():
        full = Network(ModelConfig.from_dict(ours.config.to_dict() | {"layer_types": [ALL] * 3}))
        full.load_state_dict(ours.state_dict())
        assert (full(IDS) - ours(IDS)).abs().max() > 0.1
    model(IDS, labels=IDS).loss.backward()
    loss = ours.loss(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    expected = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embed_tokens.weight.grad, expected, atol=1e-6, rtol=1e-4)


def test_a_folder_of_ours_is_transformers_network(tmp_path: Path) -> None:
    for qk_norm, name in ((True, "Qwen3"), (False, "Cwm")):
        model = windowed(qk_norm=qk_norm, rope_theta=5e5)
        folder = checkpoint(tmp_path / name, model)
        cls = {"Qwen3": Qwen3ForCausalLM, "Cwm": CwmForCausalLM}[name]
        other = cls.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(other(IDS).logits, model(IDS), atol=1e-5, rtol=0)
            greedy = other.generate(IDS[:, :20], max_new_tokens=30, do_sample=False)[0, 20:]
        assert list(model.generate(IDS[0, :20].tolist(), 30, stop=())) == greedy.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"layer_repeats": 2, "shared_kv": "first"},
        REVERSE,
    ],
)
@pytest.mark.parametrize("window", [1, 2, 7, 59, 60, 100])
def test_with_a_cache_the_logits_are_those_without(window: int, changes: dict) -> None:
    model = windowed(window, **changes)
    with torch.no_grad():
        expected = model(IDS)
        for pieces in ([1] * 60, [20, *[1] * 40], [5, 9, 1, 1, 30, 2, 1, 11], [60]):
            cache = KVCache(model.config, 1, 60, like=model.norm.weight)
            for _ in range(2):  # the second time on a cache that was emptied
                cache.length = 0
                found = torch.cat([model(x, cache) for x in IDS.split(pieces, 1)], 1)
                torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    held = sum(cache.store[:, 0, 0, 0, :, 0].numel() for _ in cache.places)
    held += sum(ring[:, 0, 0, :, 0].numel() for ring in cache.windows.values())
    numbers = held * model.config.num_key_value_heads * model.config.head_dim
    assert 4 * numbers == ModelCosts.of(model.config).kv_cache_bytes(60, 4)


@pytest.mark.parametrize("window", [1, 5, 200])
def test_documents_of_a_row_and_packed_spans_are_each_alone(window: int) -> None:
    model, lengths = windowed(window), (1, 30, 7, 22)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        alone = torch.cat([model(x) for x in IDS.split(lengths, 1)], 1)
        hidden = model.hidden(IDS, documents=documents)
        torch.testing.assert_close(model.output(hidden), alone, atol=1e-5, rtol=0)
        # Two continuations of 12 shared tokens, then an independent span.
        begin, one, other, rest = IDS.split((12, 10, 8, 30), 1)
        seen = torch.ones(30, 30, dtype=torch.bool).tril()
        seen[22:, 12:22] = False
        positions = torch.cat([torch.arange(22), torch.arange(12, 20), torch.arange(30)])
        hidden = model.hidden(IDS, packed=(positions, [Span(0, 30, seen), Span(30, 60)]))
        second = model(torch.cat((begin, other), 1))[:, 12:]
        alone = torch.cat([model(torch.cat((begin, one), 1)), second, model(rest)], 1)
        torch.testing.assert_close(model.output(hidden), alone, atol=1e-5, rtol=0)


def test_the_block_mask_has_the_window_too() -> None:
    documents = torch.tensor([[0] * 40 + [1] * 88])
    spec = AttentionSpec(9)
    table = document_mask(documents, flex=False, spec=spec)
    block = document_mask(documents, flex=True, spec=spec)
    b = h = torch.tensor(0)
    for query in (3, 39, 40, 127):
        for key in range(128):
            allowed = block.mask_mod(b, h, torch.tensor(query), torch.tensor(key))
            assert bool(allowed) == bool(table[0, 0, query, key])


@pytest.mark.parametrize("changes", [{}, {"layer_repeats": 2}, REVERSE])
def test_what_exporters_trace_is_the_same_network(changes: dict) -> None:
    model = windowed(**changes)
    static = StaticNetwork(model, context=64)
    with torch.no_grad():
        cache = static.empty_cache()
        first, cache = static(IDS[:, :25], torch.arange(25), cache)
        rest, _ = static(IDS[:, 25:], torch.arange(25, 60), cache)
        torch.testing.assert_close(torch.cat((first, rest), 1), model(IDS), atol=1e-5, rtol=0)


def test_unrolling_and_folding_keep_each_layers_window() -> None:
    model = windowed(layer_repeats=2)
    flat = unrolled(model)
    assert flat.config.layer_types == [SLIDING, SLIDING, ALL, ALL, SLIDING, SLIDING]
    assert folded(flat).config == model.config
    with torch.no_grad():
        torch.testing.assert_close(flat(IDS), model(IDS), atol=1e-5, rtol=0)
        flat.layers[2].load_state_dict(flat.layers[1].state_dict())
        for layer in flat.layers:
            layer.load_state_dict(flat.layers[1].state_dict())
    back = folded(flat)  # all weights are equal, but not what they look at
    assert (back.config.num_hidden_layers, back.config.layer_types) == (3, KINDS)


def test_costs_count_what_a_window_leaves() -> None:
    config = ModelConfig.preset("Pro-1B")
    costs, width = ModelCosts.of(config), 4 * 64
    assert sum(spec == FULL for spec in config.attention_specs) == 9
    assert costs.kv_cache_bytes(131072) == 2 * 2 * width * (9 * 131072 + 21 * 512)
    assert costs.kv_cache_bytes(100) == 100 * costs.kv_cache_bytes_per_token()
    flops = costs.flops_per_token(2048)
    assert flops["palm"] - flops["six_n"] == 12 * 1280 * (9 * 2048 + 21 * 512)


def test_each_format_has_the_windows_or_refuses_them_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", windowed())
    with pytest.raises(UserError, match="GGUF's llama has no sliding windows"):
        convert(folder, tmp_path / "m.gguf", "gguf")
    wide = checkpoint(tmp_path / "wide", windowed(128))  # nothing lies outside of it
    assert convert(wide, tmp_path / "wide.gguf", "gguf").largest_difference < 1e-6
    narrow = windowed(num_attention_heads=3, num_key_value_heads=1, head_dim=32)
    with pytest.raises(UserError, match="cwm"):
        convert(checkpoint(tmp_path / "n", narrow), tmp_path / "out", "hf")
    kept = convert(tmp_path / "n", tmp_path / "kept", "mobilellm")
    assert kept.largest_difference == 0
    assert load(tmp_path / "kept").config == narrow.config


def test_onnxruntime_has_the_windows(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    for window in (1, 7):
        folder = checkpoint(tmp_path / f"m{window}", windowed(window, head_dim=32))
        result = convert(folder, tmp_path / f"onnx{window}", "onnx", precision="F32")
        assert result.largest_difference < 1e-4


def test_executorch_has_none(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    folder = checkpoint(tmp_path / "m", windowed())
    with pytest.raises(UserError, match=r"sliding windows.*--context 7"):
        convert(folder, tmp_path / "out", "executorch")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": [SLIDING] * 2}, "each of 3 layers"),
        ({"layer_types": "sliding_attention"}, "each of 3 layers"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"sliding_window": None}, "sliding_window = None"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"layer_types": None}, "without layer_types"),
    ],
)
def test_bad_windows_are_refused_by_name(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        windowed(**changes)


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({"use_sliding_window": False, "sliding_window": 7}, None),
        ({"use_sliding_window": False, "sliding_window": 7, "layer_types": [ALL] * 3}, None),
        ({**USED, "max_window_layers": 1}, [ALL, SLIDING, SLIDING]),
        ({**USED, "max_window_layers": 0, "layer_types": [ALL] * 3}, None),
        ({**USED, "max_window_layers": 0, "sliding_window": None}, None),
    ],
)
def test_qwen3s_keys_mean_what_they_mean_to_transformers(
    tmp_path: Path, keys: dict, kinds: list[str] | None
) -> None:
    values = {key: value for key, value in SHAPE.items() if key != "sliding_window"}
    config = Qwen3Config(**values, **keys)
    assert config.layer_types == (kinds or [ALL] * 3)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "m")
    where = tmp_path / "m/config.json"
    written = json.loads(where.read_text())
    for key in ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"):
        written.pop(key, None)
    where.write_text(json.dumps(written | keys))
    assert load(tmp_path / "m").config.layer_types == kinds
