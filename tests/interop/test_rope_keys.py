"""Every spelling of rotary scaling that other tools read gives what they compute, or is refused."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.networks import checkpoint, logits, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

KIND, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"
SCALE = "llama.rope.scale_linear"
FLOAT, STRING = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING


def rewrite_gguf(source: Path, target: Path, drop: tuple[str, ...], add: dict) -> None:
    """The same GGUF with some keys left out and some added: {name: (value, type)}."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *drop):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    for key, (value, kind) in add.items():
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_both_spellings_of_the_kind_are_transformers(tmp_path: Path, name: str, where: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "m", network())
    config = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):
        config.pop(key, None)
    config[where] = {name: "linear", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    found = logits(load(folder).network)
    ids = torch.arange(40)[None] * 37 % 300
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert (found - theirs).abs().max() < 1e-5
    assert (found - logits(network())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "differ by layer"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "a part of each head"),
        ({"type": "yarn", "factor": 2.0}, "yarn"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, rope: dict, words: str) -> None:
    folder = checkpoint(tmp_path / "m", network())
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("drop", "add", "scaled"),
    [
        ((), {}, True),
        ((KIND,), {}, True),
        ((KIND, FACTOR), {SCALE: (4.0, FLOAT)}, True),
        ((KIND,), {KIND: ("none", STRING)}, False),
        ((FACTOR,), {}, False),
    ],
    ids=["as written", "factor without a type", "scale_linear of 2023", "none", "no factor"],
)
def test_gguf_keys_mean_what_they_mean_to_llama_cpp(
    tmp_path: Path, sample_text: str, drop: tuple[str, ...], add: dict, scaled: bool
) -> None:
    pytest.importorskip("xllamacpp")
    model = network(rope_scaling={"rope_type": "linear", "factor": 4.0})
    source = checkpoint(tmp_path / "m", model, train_bpe([sample_text[:30_000]], 300))
    convert(source, tmp_path / "m.gguf", "gguf")
    rewrite_gguf(tmp_path / "m.gguf", tmp_path / "k.gguf", drop, add)
    ids = [i * 37 % 300 for i in range(100)]
    ours = load(tmp_path / "k.gguf").network
    with torch.no_grad():
        expected = ours(torch.tensor([ids]))[0, -1].log_softmax(-1)
    theirs = LlamaCpp(tmp_path / "k.gguf").next_logprobs(ids, 8)
    assert max(abs(expected[token].item() - p) for token, p in theirs.items()) < 1e-3
    assert (ours.config.rope_scaling is not None) == scaled


def test_a_scaling_of_another_kind_in_gguf_is_refused(tmp_path: Path) -> None:
    convert(checkpoint(tmp_path / "m", network()), tmp_path / "m.gguf", "gguf")
    for kind in ("yarn", "longrope"):
        rewrite_gguf(tmp_path / "m.gguf", tmp_path / f"{kind}.gguf", (), {KIND: (kind, STRING)})
        with pytest.raises(UserError, match=f"type '{kind}' is not supported"):
            load(tmp_path / f"{kind}.gguf")
