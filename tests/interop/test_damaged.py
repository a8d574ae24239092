"""Damaged and hostile files end in one line, and take no memory because a header says so."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.interop.llama2c_file import llama2c_bytes
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.interop import gguf_reader
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> dict[str, Path]:
    """One small file of each format, from one network."""
    folder = tmp_path_factory.mktemp("files")
    model = network(
        vocab_size=300, num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8
    )
    source = checkpoint(folder / "hf", model, train_bpe([sample_text[:5000]], 300))
    convert(source, folder / "m.gguf", "gguf")
    convert(source, folder / "q.gguf", "gguf", precision="Q4_0")
    (folder / "m.bin").write_bytes(llama2c_bytes(model))
    (folder / "v1.bin").write_bytes(llama2c_bytes(model, version=1))
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return {p.name: p for p in folder.iterdir()}


@pytest.mark.parametrize("name", ["m.gguf", "q.gguf", "m.bin", "v1.bin"])
@pytest.mark.parametrize("change", ["empty", "truncated", "cut", "padded", "magic"])
def test_files_of_the_wrong_length_or_kind(
    small_files: dict[str, Path], tmp_path: Path, name: str, change: str
) -> None:
    content = small_files[name].read_bytes()
    changed = {
        "empty": b"",
        "truncated": content[:-1],
        "cut": content[:100],
        "padded": content + b"\0" * 4096,
        "magic": b"XXXX" + content[4:],
    }[change]
    path = tmp_path / name
    path.write_bytes(changed)
    if name.endswith("gguf") and change == "padded":
        load(path)  # GGUF allows what follows the data
        return
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize(
    "name",
    ["m.gguf", "q.gguf", "m.bin", "v1.bin", "hf", "config", "pytorch_model.bin", "tokenizer"],
)
def test_mutated_files_load_or_are_a_users_error(
    small_files: dict[str, Path], tmp_path: Path, name: str, data: st.DataObject
) -> None:
    """No crash, no hang, and no memory asked for because a header says so."""
    path = tmp_path / "fuzz"
    if path.is_dir():
        shutil.rmtree(path)
    files = {
        "hf": "model.safetensors",
        "config": "config.json",
        "pytorch_model.bin": "pytorch_model.bin",
        "tokenizer": "tokenizer.json",
    }
    if name in files:
        shutil.copytree(small_files["hf"], path)
        if name == "pytorch_model.bin":
            (path / "model.safetensors").unlink()
            shutil.copy(small_files[name], path / name)
        target = path / files[name]
        opened = path
    else:
        path.mkdir()
        target = opened = path / name
        shutil.copy(small_files[name], target)
    content = bytearray(target.read_bytes())
    header = min(len(content), 4096)  # where the structure is
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, header - 1))
        kind = data.draw(st.sampled_from(["byte", "huge", "cut", "insert", "delete"]))
        if kind == "byte":
            content[where] = data.draw(st.integers(0, 255))
        elif kind == "huge":
            content[where : where + 8] = data.draw(
                st.sampled_from(
                    [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\0\0\0\0\1\0\0\0"]
                )
            )
        elif kind == "cut":
            del content[where:]
            break
        elif kind == "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=16))
        else:
            del content[where : where + 3]
        header = max(1, min(len(content), header))
        if not content:
            break
    target.write_bytes(bytes(content))
    with contextlib.suppress(UserError):
        load(opened)


def test_headers_cannot_ask_for_memory(small_files: dict[str, Path], tmp_path: Path) -> None:
    """Huge counts anywhere in the header are refused before anything is allocated."""
    import tracemalloc

    content = small_files["m.gguf"].read_bytes()
    rng = random.Random(0)
    tracemalloc.start()
    for _ in range(200):
        changed = bytearray(content)
        where = rng.randrange(4, 3000)
        changed[where : where + 8] = (1 << rng.randrange(30, 63)).to_bytes(8, "little")
        path = tmp_path / "x.gguf"
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            gguf_reader.read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def test_tensors_of_a_gguf_may_not_overlap(tmp_path: Path) -> None:
    """A file of kilobytes could otherwise be a network of gigabytes."""
    from tests.hostile import gguf_file

    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file.whole())
    load(path)
    listed = [gguf_file.tensor(name, size[::-1], 0, 0) for name, size in gguf_file.shapes()]
    entries = [gguf_file.key(name, *value) for name, value in gguf_file.keys().items()]
    path.write_bytes(gguf_file.build(entries, listed, bytes(300 * 32 * 4)))
    with pytest.raises(UserError, match=r"tensors '.*' and '.*' overlap"):
        load(path)


def test_arrays_of_a_gguf_header_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hostile import gguf_file

    from mobilellm.gguf import header

    keys = gguf_file.keys() | {f"x{i}": ("arr", ("u8", [0] * 100)) for i in range(10)}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file.whole(keys))
    load(path)
    monkeypatch.setattr(header, "MAX_VALUES", 900)
    with pytest.raises(UserError, match="arrays of more than 900 values"):
        load(path)
