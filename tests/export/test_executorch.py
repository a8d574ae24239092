"""Programs of ExecuTorch, run by its Python runtime and by the C++ runner of its apps, are the
network they were made from."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.onnx_models import network

from mobilellm.errors import UserError
from mobilellm.export.executorch import constants, program_name, write_tokenizer
from mobilellm.export.executorch_file import store_once
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.quantize.methods import quantized_network
from mobilellm.runtimes.executorch import ExecutorchSession, check_header
from mobilellm.runtimes.table import open_session, runtime_for
from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer
from mobilellm.tokenizer.sentencepiece_file import write_model
from mobilellm.tokenizer.sentencepiece_model import read_model
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

CONTEXT = 64


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:50_000]], 320)


def converted(folder: Path, model: Network, tokenizer: Tokenizer | None, precision: str) -> Path:
    """The folder that a network is converted to: it is run and compared on the way."""
    save_checkpoint_folder = folder / "checkpoint"
    save_checkpoint_folder.mkdir()
    save_checkpoint(save_checkpoint_folder, model, tokenizer, {})
    result = convert(save_checkpoint_folder, folder / "program", "executorch", precision=precision)
    assert result.runtime == "executorch"
    if precision == "F32":
        assert result.largest_difference is not None
        assert result.largest_difference < 1e-4
    else:
        assert result.kl is not None
        assert result.kl < 0.01
    return folder / "program"


def readable(tokenizer: Tokenizer) -> Network:
    """A network that writes no byte outside ASCII: the runner streams only whole characters."""
    model = network()
    with torch.no_grad():
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            if not (text.isascii() and text.isprintable()):
                model.embed_tokens.weight[token] = 0  # its logit is 0, below the largest of others
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return converted(tmp_path_factory.mktemp("plain"), readable(tokenizer), tokenizer, "F32")


def streamed(program: Path, tokenizer: Path, prompt: str, count: int, bos: int = 0) -> str:
    """What the C++ runner of the apps writes, greedily."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    pieces: list[str] = []
    runner = TextLLMRunner(str(program), str(tokenizer))
    config = GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False, num_bos=bos)
    runner.generate(prompt, config, token_callback=pieces.append)
    return "".join(pieces)


def test_the_runner_of_the_apps_writes_our_greedy_text(plain: Path, tokenizer: Tokenizer) -> None:
    ours = readable(tokenizer)
    ids = tokenizer.encode("What is the")
    expected = tokenizer.decode(list(ours.generate(ids, 20, stop=[0])))
    found = streamed(plain / "model.pte", plain / "tokenizer.json", "What is the", 20)
    assert found == expected
    assert len(found) > 5


def test_the_file_says_its_context_and_what_ends_a_text(plain: Path) -> None:
    with open_session(plain) as session:
        assert isinstance(session, ExecutorchSession)
        assert (session.context, session.vocab_size, session.end_tokens) == (CONTEXT, 320, (0,))
        with pytest.raises(UserError, match="exceed"):
            session.feed([1] * (CONTEXT + 1))
        whole = session.feed([5, 6, 7, 8])
        assert session.rewind(2) == 2
        assert np.abs(session.feed([7, 8]) - whole).max() < 1e-5
    assert runtime_for(plain / "model.pte").name == "executorch"


def test_a_tied_embedding_is_stored_once(plain: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """XNNPACK's weights and the rows that are looked up are the same bytes of the file, which runs
    (`converted` compares its logits)."""
    model = readable(tokenizer)
    weight = model.embed_tokens.weight.detach().numpy().tobytes()
    assert (plain / "model.pte").read_bytes().count(weight) == 1
    stored = sum(parameter.numel() for parameter in model.parameters()) * 4
    constant = 2 * model.cos.numel() * 4 + 40_000  # rotations, and the program itself
    assert (plain / "model.pte").stat().st_size < stored + constant
    again = tmp_path / "again.pte"
    again.write_bytes((plain / "model.pte").read_bytes())
    assert store_once(again) == 0
    assert again.read_bytes() == (plain / "model.pte").read_bytes()


def test_only_programs_with_segments_are_changed(plain: Path, tmp_path: Path) -> None:
    program = (plain / "model.pte").read_bytes()
    for damaged in (b"x", program[:20], program[:8] + b"none" + program[12:]):
        path = tmp_path / "damaged.pte"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="segments"):
            store_once(path)
        assert path.read_bytes() == damaged


@pytest.mark.long
def test_blocks_of_four_bits_are_the_grids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The program and the dequantized network differ by the rounding of activations alone: with
    another method's integers they are further apart."""
    program = converted(tmp_path, network(), tokenizer, "INT4")
    ids = list(range(3, 43))
    with open_session(program) as session:
        found = torch.stack([torch.from_numpy(session.feed([i])) for i in ids])
    rows = quantized_network(network(), "8da4w", "search").weights["embed_tokens.weight"].integers
    held = (program / "model.pte").read_bytes()
    assert held.count(rows.to(torch.int8).numpy().tobytes()) == 1
    distances = []
    for method in ("search", "round"):
        grid = network()
        quantized_network(grid, "8da4w", method)
        with torch.inference_mode():
            expected = grid(torch.tensor([ids]))[0]
        distances.append(float((expected - found).abs().mean()))
    assert distances[0] < 0.5 * distances[1]


@pytest.mark.long
def test_a_shared_block_is_stored_once(tmp_path: Path) -> None:
    """A third and fourth application of a block, of either kind, cost a file next to nothing."""
    shape = {"num_hidden_layers": 1, "hidden_size": 128, "head_dim": 32, "qk_norm": True}
    sizes = {}
    for kind, repeats in (("own", 1), ("own", 3), ("first", 3)):
        model = network(layer_repeats=repeats, shared_kv=kind, **shape)
        folder = tmp_path / f"{kind}-{repeats}"
        folder.mkdir()
        program = converted(folder, model, None, "F32")
        sizes[kind, repeats] = (program / "model.pte").stat().st_size
    block = sum(parameter.numel() for parameter in model.layers.parameters()) * 4
    for kind in ("own", "first"):
        assert sizes[kind, 3] - sizes["own", 1] < 0.2 * block


def test_a_sentencepiece_tokenizer_goes_along_as_the_runner_reads_it(
    tmp_path: Path, shared: Path
) -> None:
    model = read_model(shared / "tokenizer/llama2-32k/tokenizer.model")
    tokenizer = Tokenizer(to_fast_tokenizer(model), name="llama", bos_id=1, eos_id=2)
    write_tokenizer(tmp_path, tokenizer)
    again = read_model(tmp_path / "tokenizer.model")
    assert (again.pieces, again.types) == (model.pieces, model.types)
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "Hello  two   spaces, naïve café — 日本語 🙂 12345\n\tdef f(x):"
    assert processor.encode(text) == tokenizer.encode(text)


def test_a_model_file_is_read_back_equal(tmp_path: Path, shared: Path) -> None:
    model = read_model(shared / "tokenizer/llama2-32k/tokenizer.model")
    changed = dataclasses.replace(model, pad_id=None, add_dummy_prefix=False, unk_id=0)
    write_model(changed, tmp_path / "tokenizer.model")
    again = read_model(tmp_path / "tokenizer.model")
    assert dataclasses.replace(again, normalizer_name=changed.normalizer_name) == changed


def test_the_name_tells_the_ios_app_the_form_of_prompts(tokenizer: Tokenizer) -> None:
    named = {
        "{{ '<|im_start|>' }}": "smollm3.pte",
        "{{ '<|start_header_id|>' }}": "llama.pte",
        "{{ 'User:' }}": "model.pte",
    }
    for template, name in named.items():
        other = Tokenizer(tokenizer.fast, name="other", bos_id=None, eos_id=0)
        other.chat_template = template
        assert program_name(other) == name
    assert program_name(None) == "model.pte"


def test_several_end_tokens_are_all_named() -> None:
    config = dataclasses.replace(network().config, eos_token_id=[0, 5])
    assert constants(config, 32)["get_eos_ids"] == [0, 5]
    assert constants(config, 32)["get_max_seq_len"] == 31


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_damaged_program_is_one_line(plain: Path, tmp_path: Path, damage: str) -> None:
    data = (plain / "model.pte").read_bytes()
    file = tmp_path / "model.pte"
    file.write_bytes({"empty": b"", "text": b"<html>" * 40, "cut": data[: len(data) // 3]}[damage])
    with pytest.raises(UserError, match=r"not an ExecuTorch program|refused by ExecuTorch"):
        ExecutorchSession(file)


def test_other_bits_than_the_models_are_refused(tmp_path: Path) -> None:
    model = network()
    quantized = quantized_network(model, "int8", "round")
    save_checkpoint(tmp_path, model, None, {})
    quantized.save(tmp_path, model.config)
    assert load(tmp_path).quantized is not None
    with pytest.raises(UserError, match="quantized to 8 bits"):
        convert(tmp_path, tmp_path / "out", "executorch", precision="INT4")
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_it_is(plain: Path) -> None:
    said = json.loads((plain / "mobilellm.json").read_text())["executorch"]
    assert said == {"program": "model.pte", "context": CONTEXT, "number_type": "F32"}
    check_header(plain / "model.pte")


@pytest.mark.long
def test_the_runner_reads_a_sentencepiece_model_and_writes_our_greedy_text(
    tmp_path: Path, shared: Path
) -> None:
    model = read_model(shared / "tokenizer/llama2-32k/tokenizer.model")
    tokenizer = Tokenizer(to_fast_tokenizer(model), name="llama", bos_id=1, eos_id=2)
    ours = network(vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2)
    with torch.no_grad():  # only pieces of plain text are written: their embedding is the logits'
        for token, piece in enumerate(model.pieces):
            if not (piece.isascii() or piece.replace("\u2581", "").isascii()) or token < 259:
                ours.embed_tokens.weight[token] = 0
    program = converted(tmp_path, ours, tokenizer, "F32")
    prompt = "The river rises in the"
    ids = [1, *tokenizer.encode(prompt)]
    written = list(ours.generate(ids, 20, stop=[2]))
    expected = tokenizer.decode([*ids[1:], *written])[len(tokenizer.decode(ids[1:])) :]
    found = streamed(program / "model.pte", program / "tokenizer.model", prompt, 20, bos=1)
    assert found == expected
    assert " " in found
