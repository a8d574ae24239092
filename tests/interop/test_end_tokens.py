"""Generation stops at the tokens at which transformers and llama.cpp stop."""

import json
from pathlib import Path

import pytest
import torch
from tests.interop.llama_cpp import LlamaCpp
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.interop.load import load
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

PROMPT = [5, 6, 7, 8]


def lively() -> Network:
    """A network whose greedy text does not repeat itself at once."""
    model = network()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(6)
    return model


def with_end_tokens(folder: Path, model: Network, config_eos: object, eos: object) -> Path:
    """A checkpoint whose two files name these end tokens; None leaves out the second."""
    checkpoint(folder, model)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config_eos}
    (folder / "config.json").write_text(json.dumps(config))
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": eos, "pad_token_id": 0}))
    if eos is None:
        generation.unlink()
    return folder


@pytest.mark.parametrize("case", ["both files", "generation alone", "one number", "config alone"])
def test_end_tokens_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM

    model = lively()
    free = list(model.generate(PROMPT, 12, stop=[]))
    end = free[5]
    named = {
        "both files": ([0, end], [0, end]),
        "generation alone": (0, [0, end]),
        "one number": (0, end),
        "config alone": (end, None),
    }[case]
    folder = with_end_tokens(tmp_path / "m", model, *named)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, len(PROMPT) :]
    expected = [token for token in theirs.tolist() if token not in (0, end)]
    assert list(load(folder).network.generate(PROMPT, 12)) == expected == free[: free.index(end)]
    convert(folder, tmp_path / "again", "hf")
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    wanted = named[1] if named[1] is not None else named[0]
    assert written["eos_token_id"] == wanted


def test_a_second_end_token_goes_through_gguf(tmp_path: Path, sample_text: str) -> None:
    pytest.importorskip("xllamacpp")
    model = lively()
    end = list(model.generate(PROMPT, 12, stop=[]))[5]
    folder = with_end_tokens(tmp_path / "m", model, 0, [0, end])
    train_bpe([sample_text[:30_000]], 320).save(folder)
    assert convert(folder, tmp_path / "m.gguf", "gguf").notes == []
    assert load(tmp_path / "m.gguf").config.eos_token_id == [0, end]
    assert LlamaCpp(tmp_path / "m.gguf").stops(PROMPT, 12)
    three = with_end_tokens(tmp_path / "three", model, 0, [0, end, 7])
    train_bpe([sample_text[:30_000]], 320).save(three)
    (note,) = convert(three, tmp_path / "three.gguf", "gguf").notes
    assert note == "GGUF names no more than two end tokens: [7] are left out"


def test_end_tokens_that_are_none_are_refused_or_never_come(tmp_path: Path) -> None:
    beyond = with_end_tokens(tmp_path / "beyond", network(), 3, [3, 999])
    assert load(beyond).config.eos_token_id == 3
    for wrong in ("x", [True], -1):
        folder = with_end_tokens(tmp_path / f"wrong{wrong}", network(), 3, wrong)
        with pytest.raises(UserError, match="must be token ids"):
            load(folder)
