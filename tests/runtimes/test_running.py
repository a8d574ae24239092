"""Text, held-out loss and task scores of a file by whatever runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import command_line
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import score_text
from mobilellm.interop.load import load
from mobilellm.model.generation import Sampling
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.running import default_runtime, generate, open_model
from mobilellm.tasks.engine import Engine, NetworkBackend
from mobilellm.tasks.requests import Request
from mobilellm.tasks.session_backend import SessionBackend, session_score
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    """A checkpoint `m`, the same as `m.gguf`, and a text."""
    pytest.importorskip("xllamacpp")
    found = tmp_path_factory.mktemp("running")
    # weights this large make the first choice clear
    model = network(eos_token_id=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(3)
    checkpoint(found / "m", model, train_bpe([sample_text[:30_000]], 300))
    convert(found / "m", found / "m.gguf", "gguf")
    (found / "text.txt").write_text(sample_text[1000:1400])
    return found


def call(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    return command_line.call(capsys, *arguments, status=status)[status != 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, seed=3)])
def test_a_session_writes_what_the_network_writes(folder: Path, sampling: Sampling) -> None:
    model = load(folder / "m").network
    prompt = [5, 9, 70]
    expected = list(model.generate(prompt, 20, sampling, stop=[]))
    assert list(generate(NetworkSession(model), prompt, 20, sampling, stop=[])) == expected
    stop = expected[7]
    ended = list(generate(NetworkSession(model), prompt, 20, sampling, stop=[stop]))
    assert ended == expected[: expected.index(stop)]


def test_the_prompt_and_new_tokens_must_fit(folder: Path) -> None:
    session = NetworkSession(load(folder / "m").network, context=10)
    assert len(list(generate(session, [1] * 6, 4, Sampling(), stop=[]))) == 4
    session.reset()
    with pytest.raises(UserError, match="6 tokens of prompt and 5 new ones exceed") as refused:
        next(generate(session, [1] * 6, 5, Sampling()))
    assert refused.value.hint == "at most 4 new ones fit"
    with pytest.raises(UserError, match="the prompt is empty"):
        next(generate(session, [], 5, Sampling()))


def test_every_runtime_writes_the_same_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--prompt", "the king", "--max-new-tokens", 16, "--threads", 1, "--json")
    for settings in (("--temperature", 0), ("--temperature", 0.5, "--seed", 5)):
        found = {}
        for model, runtime in (("m", ()), ("m.gguf", ()), ("m.gguf", ("--runtime", "llama.cpp"))):
            out = call(capsys, "generate", folder / model, *common, *settings, *runtime)
            said = json.loads(out)
            found[model, said["runtime"]] = said["text"]
        assert set(found) == {
            ("m", "mobilellm"), ("m.gguf", "mobilellm"), ("m.gguf", "llama.cpp"),
        }  # fmt: skip
        assert len(set(found.values())) == 1


def test_wrong_runtimes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf, options = folder / "m.gguf", ("--text", folder / "text.txt")
    for verb, more in (("generate", ()), ("eval", options)):
        err = call(capsys, verb, gguf, "--runtime", "llama", *more, status=2)
        assert "unknown runtime 'llama'; did you mean 'llama.cpp'?" in err
        err = call(capsys, verb, folder / "m", "--runtime", "llama.cpp", *more, status=2)
        assert "does not run such a file" in err
        err = call(capsys, verb, gguf, "--threads", 0, "--runtime", "llama.cpp", *more, status=2)
        assert "threads 0: must be 1 or more" in err
    llama = ("eval", gguf, "--runtime", "llama.cpp")
    assert "nothing to score it on" in call(capsys, *llama, status=2)
    assert "leave out --precision" in call(
        capsys, *llama, *options, "--precision", "bf16", status=2
    )
    assert "--max-tokens 1" in call(capsys, *llama, *options, "--max-tokens", 1, status=2)


def test_a_folder_without_weights_is_not_for_our_network(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "m/config.json").read_text())
    with pytest.raises(UserError, match="no runtime knows such a file"):
        default_runtime(tmp_path)


def test_a_model_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m", network())
    with pytest.raises(UserError, match="has no tokenizer"), open_model(tmp_path / "m"):
        pass


@pytest.mark.parametrize("stride", [0, 20])
def test_a_text_scored_token_by_token_has_the_loss_of_its_windows(
    folder: Path, stride: int
) -> None:
    loaded = load(folder / "m")
    tokenizer = loaded.require_tokenizer()
    options = {"sequence_length": 48, "stride": stride}
    expected = score_text(loaded.network, tokenizer, folder / "text.txt", **options)
    found = session_score(NetworkSession(loaded.network), tokenizer, folder / "text.txt", **options)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_eval_by_llama_cpp_agrees_with_our_network(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--text", folder / "text.txt", "--max-tokens", 60, "--json")
    ours = json.loads(call(capsys, "eval", folder / "m", *arguments))
    theirs = json.loads(
        call(capsys, "eval", folder / "m.gguf", "--runtime", "llama.cpp", *arguments)
    )
    assert (theirs["tokens"], theirs["bytes"]) == (ours["tokens"], ours["bytes"])
    assert theirs["tokens"] <= 60
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-3)


def test_a_session_scores_items_as_the_network_does(folder: Path) -> None:
    """Choices that share a context, that are one token each, and that stand alone."""
    model = load(folder / "m").network
    generator = np.random.default_rng(0)
    context = tuple(generator.integers(1, 300, 12).tolist())
    requests = [
        *(Request((*context, *generator.integers(1, 300, n).tolist()), n) for n in (3, 1, 1, 5)),
        Request(tuple(generator.integers(1, 300, 9).tolist()), 4),
        Request((*context[:-1], 7, 8, 9), 2),
    ]
    keys = [0, 0, 0, 0, 1, 0]
    expected = Engine(NetworkBackend(model)).score(requests, keys)
    found = Engine(SessionBackend(NetworkSession(model))).score(requests, keys)
    for theirs, mine in zip(expected, found, strict=True):
        assert mine.loglikelihood == pytest.approx(theirs.loglikelihood, rel=1e-5)
        assert mine.greedy == theirs.greedy
