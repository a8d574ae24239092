"""onnxruntime and onnxruntime-genai as runtimes, and files that are not ours to run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.export.onnx_models import KINDS, logits, network

from mobilellm.cli import main
from mobilellm.errors import UserError
from mobilellm.export.onnx_folder import write
from mobilellm.interop.writer import ModelToWrite
from mobilellm.runtimes import onnxruntime
from mobilellm.runtimes.table import open_session, runtimes_of
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

IDS = [(37 * i + 5) % 320 for i in range(40)]
RUNTIMES = ["onnxruntime", "onnxruntime-genai"]


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 320)


def written(path: Path, kind: str, number_type: str, tokenizer: Tokenizer | None) -> Path:
    path.mkdir()
    asked = ModelToWrite(
        network=network(**KINDS[kind]), tokenizer=tokenizer, number_type=number_type, origin={}
    )
    write(path, asked)
    return path


@pytest.mark.parametrize("kind", ["plain", "first, three times, qk_norm"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_chunks_tokens_and_a_second_sequence_give_the_logits_of_the_network(
    runtime: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    monkeypatch.setattr(onnxruntime, "FIRST_ROOM", 8)  # so that memory grows on the way
    folder = written(tmp_path / "model", kind, "F32", tokenizer)
    expected = logits(network(**KINDS[kind]), IDS)
    if runtime == RUNTIMES[1]:
        pytest.importorskip("onnxruntime_genai")
    with open_session(folder, runtime, threads=1) as session:
        assert (session.vocab_size, session.context, session.end_tokens) == (320, 64, (0,))
        for chunks in ([40], [7, 1, 20, 1, 11], [1] * 40):
            session.reset()
            at = 0
            for size in chunks:
                found = session.feed(IDS[at : at + size])
                at += size
                assert np.abs(found - expected[at - 1]).max() < 1e-4
        assert session.rewind(25) == 25
        assert np.abs(session.feed(IDS[25:33]) - expected[32]).max() < 1e-4


def test_a_full_cache_is_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "plain", "F32", None)
    with open_session(folder, "onnxruntime", context=10) as session:
        session.feed(IDS[:10])
        with pytest.raises(UserError, match="context of 10"):
            session.feed([1])
        for ids, message in (([], "no tokens"), ([320], "outside"), ([-1], "negative")):
            with pytest.raises(UserError, match=message):
                session.feed(ids)
    for context in (0, 65):
        with (
            pytest.raises(UserError, match="from 1 to the file's 64"),
            open_session(folder, "onnxruntime", context=context),
        ):
            pass


def test_the_best_file_of_a_folder_is_taken(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = written(tmp_path / "model", "plain", "ALL", tokenizer)
    assert onnxruntime.file_of(folder).name == "model_q4.onnx"
    assert [runtime.name for runtime in runtimes_of(folder)] == RUNTIMES
    alone = folder / "onnx/model.onnx"
    assert [runtime.name for runtime in runtimes_of(alone)] == RUNTIMES[:1]
    found = onnxruntime.tokenizer_of(alone)
    assert found is not None
    assert found.encode("My lord") == tokenizer.encode("My lord")


# --- files of others ---


def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        model = onnx.load(file)
        change(model)
        file.write_bytes(model.SerializeToString())

    return write


def _said(key: str, value: str) -> Callable[[Path], None]:
    def change(model: Any) -> None:
        (entry,) = [p for p in model.metadata_props if p.key == key]
        entry.value = value

    return changed(change)


def _outside(model: Any) -> None:
    (tensor,) = [t for t in model.graph.initializer if t.name == "embed_tokens.weight"]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")


def _huge_tensor(model: Any) -> None:
    model.graph.initializer[0].dims[:] = [1 << 40, 1 << 20]


def _huge_cache(model: Any) -> None:
    for port in [*model.graph.input, *model.graph.output]:
        if ".key" in port.name or ".value" in port.name:
            port.type.tensor_type.shape.dim[1].dim_value = 1 << 40


def _huge_vocabulary(model: Any) -> None:
    (port,) = [port for port in model.graph.output if port.name == "logits"]
    port.type.tensor_type.shape.dim[2].dim_value = 1 << 40


def _other_inputs(model: Any) -> None:
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, [1, 1])
    )


def _unknown_operator(model: Any) -> None:
    model.graph.node[5].op_type = "FormatDisk"


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 40),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "no properties": changed(lambda model: model.ClearField("metadata_props")),
    "context no number": _said("context", "many"),
    "context too large": _said("context", str(1 << 62)),
    "context negative": _said("context", "-1"),
    "end tokens no list": _said("end_tokens", "{}"),
    "end tokens no numbers": _said("end_tokens", '["</s>"]'),
    "end tokens no JSON": _said("end_tokens", "[" * 100_000),
    "another input": changed(_other_inputs),
    "unknown operator": changed(_unknown_operator),
    "data outside": changed(_outside),
    "a huge tensor": changed(_huge_tensor),
    "a huge cache": changed(_huge_cache),
    "a huge vocabulary": changed(_huge_vocabulary),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_file_is_one_line(
    damage: str, tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "model", "plain", "F32", tokenizer)
    DAMAGES[damage](folder / "onnx/model.onnx")
    capfd.readouterr()
    asked = ["generate", str(folder), "--runtime", "onnxruntime", "--prompt", "a"]
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--max-new-tokens", "2"])
    assert ended.value.code == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1, said.err
    assert "model.onnx" in said.err


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": {}}', '{"model": {"context_length": "x"}}', "{" * 10_000]
)
def test_damaged_settings_of_genai_are_one_line(
    text: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = written(tmp_path / "model", "plain", "F32", tokenizer)
    (folder / "genai_config.json").write_text(text)
    with (
        pytest.raises(UserError, match=r"genai_config\.json"),
        open_session(folder, "onnxruntime-genai"),
    ):
        pass


def test_a_prompt_that_genai_breaks_off_is_forgotten(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = written(tmp_path / "model", "plain", "F32", tokenizer)
    with open_session(folder, RUNTIMES[1], threads=1) as session:
        session.reset()  # nothing is held: nothing to do
        expected = session.feed(IDS[:9])
        session.reset()
        real = session.generator

        class BrokenOff:
            def append_tokens(self, ids: np.ndarray) -> None:
                real.append_tokens(ids)
                raise KeyboardInterrupt

        session.generator = BrokenOff()
        with pytest.raises(KeyboardInterrupt):
            session.feed(IDS[20:25])
        session.generator = real
        session.reset()
        assert np.abs(session.feed(IDS[:9]) - expected).max() < 1e-5


def test_genais_own_words_are_passed_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = written(tmp_path / "model", "plain", "F32", tokenizer)
    (folder / "onnx/model.onnx").write_bytes(b"no model")
    with (
        pytest.raises(UserError, match="refused by onnxruntime-genai"),
        open_session(folder, "onnxruntime-genai"),
    ):
        pass
    settings = json.loads((folder / "genai_config.json").read_text())
    settings["model"]["decoder"]["num_hidden_layers"] = 90
    (folder / "genai_config.json").write_text(json.dumps(settings))
    with (
        pytest.raises(UserError, match="onnxruntime-genai"),
        open_session(folder, "onnxruntime-genai"),
    ):
        pass


def test_a_folder_without_models_is_named(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    with pytest.raises(UserError, match="no runtime knows"):
        runtimes_of(tmp_path)
    with pytest.raises(UserError, match=r"holds no onnx/\*\.onnx"):
        onnxruntime.file_of(tmp_path)
