"""Files and folders that are written have the permissions that umask gives, and no others."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network

from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=["022", "027", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Every path below a folder whose permissions are not those of umask."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.stat().st_mode & 0o777
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask:
            found[str(path.relative_to(folder))] = oct(mode)
    return found


def test_converted_models_follow_umask(tmp_path: Path, umask: int, sample_text: str) -> None:
    tokenizer = train_bpe([sample_text[:30_000]], 300)
    checkpoint(tmp_path / "m", network(), tokenizer)
    convert(tmp_path / "m", tmp_path / "hf", "hf")
    convert(tmp_path / "m", tmp_path / "m.gguf", "gguf", precision="Q8_0")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert wrong_modes(tmp_path, umask) == {}


def test_a_run_and_its_checkpoints_follow_umask(
    tmp_path: Path, umask: int, small_data: Path
) -> None:
    from mobilellm.recipe.recipe import DataSection, ModelSection, Recipe, TrainSection
    from mobilellm.train.start import train

    recipe = Recipe(
        model=ModelSection(preset="1M", override={"num_hidden_layers": 1}),
        data=DataSection(path=str(small_data), sequence_length=64),
        train=TrainSection(steps=1, batch_tokens=256, precision="fp32", compile="off"),
    )
    train(tmp_path / "run", recipe)
    assert list(tmp_path.rglob("train_state/*.safetensors"))
    assert wrong_modes(tmp_path, umask) == {}
