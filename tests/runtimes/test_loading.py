"""What our own network holds of a file, and the memory that opening it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.interop.networks import network

from mobilellm import cli
from mobilellm.decoding import library
from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.quantize.methods import quantized_network
from mobilellm.runtimes import ours
from mobilellm.runtimes.running import open_model
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

# Bytes held before and after opening a model, and the most in between, in a process of its own.
OPENED = """
import sys, torch, torch._dynamo
from pathlib import Path
from mobilellm.decoding.library import library
from mobilellm.budget import held
from mobilellm.hardware.device_memory import forget_peak, peak_memory
from mobilellm.model.precision import Precision
from mobilellm.runtimes.ours import open_network
library(), open_network(Path(sys.argv[1], "warm"))
forget_peak()
before = held()
precision = Precision(sys.argv[2]) if sys.argv[2:] else None
session = open_network(Path(sys.argv[1], "model"), None, 1, precision)
print(peak_memory(torch.device("cpu")) - before, held() - before)
"""
WIDE = ModelConfig(
    vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2,
    num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=64,
)  # fmt: skip


def save(folder: Path, model: Network, scheme: str | None = None) -> Path:
    """A checkpoint without a tokenizer, quantized where a scheme is named."""
    folder.mkdir()
    quantized = quantized_network(model, scheme, "round", "int8") if scheme else None
    save_checkpoint(folder, model, None, {})
    if quantized is not None:
        quantized.save(folder, model.config)
    return folder


@pytest.mark.parametrize("case", ["float", "bf16", "int4", "stored bf16"])
def test_opening_takes_little_more_than_the_file(case: str, tmp_path: Path) -> None:
    """At most 1.15 times the bytes of the file at any moment; integers then take the least."""
    if not sys.platform.startswith("linux"):
        pytest.skip("no system that tells")
    save(tmp_path / "warm", network())
    if case == "stored bf16":
        if library.library() is None:
            pytest.skip(library.fault())
        save(tmp_path / "wide", Network(WIDE))
        model = tmp_path / "model"
        convert(tmp_path / "wide", model, "hf", precision="BF16", verify=False)
    else:
        model = save(tmp_path / "model", Network(WIDE), "int4" if case == "int4" else None)
    arguments = [OPENED, str(tmp_path), *(["bf16"] if case == "bf16" else [])]
    said = subprocess.run(
        [sys.executable, "-c", *arguments], capture_output=True, text=True, check=True
    )
    peak, after = (int(number) for number in said.stdout.split())
    size = (model / "model.safetensors").stat().st_size
    assert size > 75e6
    assert 0.9 * size < peak < 1.15 * size
    held = {"float": 1.0, "bf16": 0.5, "int4": 0.21, "stored bf16": 1.0}[case]
    if library.library() is not None:
        assert after < (held + 0.3) * size


def kinds(session: ours.NetworkSession) -> set[torch.dtype]:
    """Number types of the matrices that a session holds."""
    tensors = (*session.network.parameters(), *session.network.buffers())
    return {tensor.dtype for tensor in tensors if tensor.ndim == 2 and tensor.shape[1] > 32}


def test_weights_are_held_as_they_are_stored(tmp_path: Path) -> None:
    if library.library() is None:
        pytest.skip(library.fault())
    plain = save(tmp_path / "plain", network())
    convert(plain, tmp_path / "halves", "hf", precision="BF16", verify=False)
    integers = save(tmp_path / "integers", network(), "int8")
    full, half, byte = torch.float32, torch.bfloat16, torch.int8
    for path, precision, expected in (
        (plain, None, full), (plain, Precision.BF16, half), (plain, Precision.FP32, full),
        (tmp_path / "halves", None, half), (tmp_path / "halves", Precision.FP32, full),
        (integers, None, byte), (integers, Precision.BF16, byte),
    ):  # fmt: skip
        assert kinds(ours.open_network(path, precision=precision)) == {expected}, path


def test_stored_halves_give_the_numbers_of_float32(tmp_path: Path) -> None:
    """What is stored in bf16 and held so is computed as its float32; with bf16 asked for a
    prompt's products are bf16."""
    save(tmp_path / "plain", network())
    convert(tmp_path / "plain", tmp_path / "halves", "hf", precision="BF16", verify=False)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = ours.NetworkSession(load(tmp_path / "halves").network)
    held = ours.open_network(tmp_path / "halves")
    asked = ours.open_network(tmp_path / "halves", precision=Precision.BF16)
    for fed in (ids, [7]):
        wanted, found = (torch.from_numpy(s.feed(fed)) for s in (expected, held))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.std()))
        rounded = torch.from_numpy(asked.feed(fed))
        assert 0 < (rounded - wanted).std() < 0.03 * wanted.std()


def test_without_a_compiler_halves_are_widened_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "library_fault", lambda: "there is no C++ compiler")
    save(tmp_path / "plain", network())
    convert(tmp_path / "plain", tmp_path / "halves", "hf", precision="BF16", verify=False)
    session = ours.open_network(tmp_path / "halves")
    assert kinds(session) == {torch.float32}
    assert session.notes == (
        "tokens come from torch's products, several times slower: there is no C++ compiler",
    )


def test_generate_takes_a_precision(
    tmp_path: Path, sample_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save(tmp_path / "m", network())
    train_bpe([sample_text[:30_000]], 300).save(model)
    said = []
    for precision in ("fp32", "bf16"):
        with pytest.raises(SystemExit) as ended:
            cli.main(
                ["generate", str(model), "--prompt", "the", "--max-new-tokens", "5",
                 "--temperature", "0", "--json", "--precision", precision]
            )  # fmt: skip
        assert not ended.value.code
        said.append(json.loads(capsys.readouterr().out))
    assert [len(one["tokens"]) for one in said] == [5, 5]
    pytest.importorskip("xllamacpp")
    convert(model, tmp_path / "m.gguf", "gguf", verify=False)
    with (
        pytest.raises(UserError, match="in the precision that it was written in"),
        open_model(tmp_path / "m.gguf", "llama.cpp", precision=Precision.BF16),
    ):
        pass
