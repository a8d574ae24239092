"""What a teacher says is kept as it is, part by part, and only for what it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.golden.cases import make_data

from mobilellm import cli
from mobilellm.data.dataset import open_dataset
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.token_folder import TokenFolder
from mobilellm.derived import teacher_cache
from mobilellm.derived.teacher_cache import TeacherCache, make_cache
from mobilellm.errors import UserError
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.workflows.distill import distill

LENGTH = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("cache"))


def teacher(data: TokenFolder, **changes: Any) -> Network:
    torch.manual_seed(5)
    values = {"vocab_size": data.vocab_size, "num_hidden_layers": 1} | changes
    found = Network(ModelConfig.preset("1M", **values)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(4)
    return found


@pytest.mark.parametrize("documents", [False, True])
def test_a_sample_has_what_the_teacher_says_of_it(
    data: Path, documents: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_TOKENS", 5 * LENGTH)
    opened = TokenFolder.open(data)
    model = teacher(opened)
    options: dict[str, Any] = {"sequence_length": LENGTH, "mask_documents": documents}
    make_cache(tmp_path / "c", model, opened, top_k=7, **options)
    cache = TeacherCache.open(tmp_path / "c", opened, vocab_size=opened.vocab_size, **options)
    state = DataState(seed=3, epoch=2, samples=0, fingerprint="")
    for source in opened.sources():
        stream = opened.tokens("train", source)
        stream.beside = cache.beside[source]
        loader = Loader(stream, LENGTH, 6, state, mask_documents=documents)
        seen = []
        for (batch, _), _ in zip(loader, range(3), strict=False):
            seen.append(batch.inputs)
            numbers = None if batch.documents is None else torch.from_numpy(batch.documents)
            with torch.no_grad():
                hidden = model.hidden(torch.from_numpy(batch.inputs), documents=numbers)
                scores = model.output(hidden).log_softmax(-1)
            values, ids = scores.topk(7)
            found, kept = batch.beside
            assert (torch.from_numpy(found.astype(np.int64)) == ids).float().mean() > 0.999
            torch.testing.assert_close(
                torch.from_numpy(kept[..., :7]).float(), values, atol=1e-2, rtol=1e-3
            )
            total = np.exp(kept.astype(np.float64)).sum(-1)
            assert np.abs(total - 1).max() < 2e-3
        starts = np.concatenate(seen)[:, 0]
        cut = stream.read(0, len(stream))[::LENGTH]
        assert np.isin(starts, cut).all()
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.npy"))
    tokens = sum(len(opened.tokens("train", s)) // LENGTH * LENGTH for s in opened.sources())
    assert size == pytest.approx(tokens * (4 * 7 + 2), rel=0.05)


def test_rows_of_samples_have_theirs(data: Path, tmp_path: Path) -> None:
    ids = TokenFolder.open(data).tokens("train").read(0, 40 * 129) % 280
    (tmp_path / "rows/1").mkdir(parents=True)
    lines = [json.dumps({"token_ids": row.tolist()}) + "\n" for row in ids.reshape(40, 129)]
    (tmp_path / "rows/1/a.jsonl").write_text("".join(lines))
    opened = open_dataset(tmp_path / "rows", data / "tokenizer")
    (source,) = opened.sources()
    model = teacher(opened)  # type: ignore[arg-type]
    make_cache(tmp_path / "c", model, opened, sequence_length=64, top_k=3)
    cache = TeacherCache.open(
        tmp_path / "c",
        opened,
        sequence_length=64,
        mask_documents=False,
        vocab_size=opened.vocab_size,
    )
    stream = opened.tokens("train")
    stream.beside = cache.beside[source]
    state = DataState(seed=3, epoch=0, samples=0, fingerprint="")
    batch, _ = next(iter(Loader(stream, 64, 20, state)))
    with torch.no_grad():
        likeliest = model(torch.from_numpy(batch.inputs)).argmax(-1).numpy()
    assert (batch.beside[0][..., 0] == likeliest).mean() > 0.999


def interrupted_at(call: int, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let the teacher's call of that number be stopped by Ctrl-C; as many entries as there were
    calls."""
    real, calls = teacher_cache._likeliest, list[None]()

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(teacher_cache, "_likeliest", failing)
    return calls


def test_one_that_was_stopped_goes_on_with_the_same_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_TOKENS", 40 * LENGTH)
    opened = TokenFolder.open(data)
    model = teacher(opened)
    options: dict[str, Any] = {"sequence_length": LENGTH, "top_k": 4}
    make_cache(tmp_path / "whole", model, opened, **options)
    calls = interrupted_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "c", model, opened, **options)
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "c.making").is_dir()
    before = len(calls)
    make_cache(tmp_path / "c", model, opened, **options)
    assert len(calls) - before < 1 + len(list((tmp_path / "c").glob("*.ids.npy"))) * 2
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "c"}


def test_parts_of_other_settings_are_not_taken_over(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_TOKENS", 40 * LENGTH)
    opened = TokenFolder.open(data)
    interrupted_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "c", teacher(opened), opened, sequence_length=LENGTH, top_k=4)
    other = teacher(opened, rope_theta=5e5)
    with torch.no_grad():
        other.embed_tokens.weight.add_(0.01)
    make_cache(tmp_path / "c", other, opened, sequence_length=LENGTH, top_k=4)
    make_cache(tmp_path / "d", other, opened, sequence_length=LENGTH, top_k=4)
    for path in (tmp_path / "c").iterdir():
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()


def test_a_cache_that_is_damaged_or_for_something_else_is_one_line(
    data: Path, tmp_path: Path
) -> None:
    opened = TokenFolder.open(data)
    make_cache(tmp_path / "c", teacher(opened), opened, sequence_length=LENGTH, top_k=4)
    right: dict[str, Any] = {
        "sequence_length": LENGTH,
        "mask_documents": False,
        "vocab_size": opened.vocab_size,
    }
    TeacherCache.open(tmp_path / "c", opened, **right)
    for change, message in (
        ({"sequence_length": 32}, "made for sequence length 64, not 32"),
        ({"mask_documents": True}, "made for mask documents False, not True"),
        ({"vocab_size": opened.vocab_size + 8}, "made for vocab size"),
        ({"temperature": 2.0}, r"made for temperature 1\.0, not 2\.0"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            TeacherCache.open(tmp_path / "c", opened, **right | change)
        assert "\n" not in str(caught.value)
    ids = next((tmp_path / "c").glob("*.ids.npy"))
    sound = ids.read_bytes()
    for damaged, message in (
        (sound[:-2], "bytes where"),
        (sound[:-9] + bytes([sound[-9] ^ 4]) + sound[-8:], "its checksum differs"),
    ):
        ids.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            TeacherCache.open(tmp_path / "c", opened, **right)
    ids.unlink()
    with pytest.raises(UserError, match="missing"):
        TeacherCache.open(tmp_path / "c", opened, **right)
    with pytest.raises(UserError, match="no such folder"):
        TeacherCache.open(tmp_path / "none", opened, **right)


def test_teachers_that_do_not_fit_are_one_line(data: Path, tmp_path: Path) -> None:
    opened = TokenFolder.open(data)
    model = teacher(opened)
    tokenizer = opened.tokenizer()
    (tmp_path / "t").mkdir()
    save_checkpoint(tmp_path / "t", model, tokenizer, {})
    for options, message in (
        ({"top_k": 0}, "top-k 0: must be from 1 to"),
        ({"top_k": 10**6}, "top-k 1000000: must be from 1 to"),
        ({"sequence_length": 10**6}, "the teacher's context is"),
        ({"temperature": 0.0}, "temperature 0: must be above 0"),
        ({"temperature": float("nan")}, "temperature nan"),
    ):
        with pytest.raises(UserError, match=message):
            distill(tmp_path / "t", data, tmp_path / "c", **options)
    from mobilellm.tokenizer.tokenizer import train_bpe

    foreign = train_bpe(["other words of another kind " * 40], 290)
    (tmp_path / "f").mkdir()
    save_checkpoint(tmp_path / "f", teacher(opened, vocab_size=290), foreign, {})
    with pytest.raises(UserError, match="another tokenizer"):
        distill(tmp_path / "f", data, tmp_path / "c")
    assert not list(tmp_path.glob("*c*"))


def test_the_verb(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = TokenFolder.open(data)
    (tmp_path / "t").mkdir()
    save_checkpoint(tmp_path / "t", teacher(opened), opened.tokenizer(), {})
    given = ["distill", tmp_path / "t", data, "--out", tmp_path / "c", "--top-k", "3"]
    given += ["--sequence-length", "64", "--precision", "fp32"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, given)])
    assert ended.value.code == 0
    assert "3 tokens of each distribution" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, given)])
    assert ended.value.code == 2
    assert "exists already" in capsys.readouterr().err
