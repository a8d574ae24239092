"""The bit a token that says what is trained on: written, read, checked, and -100 among the
targets where it is not set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest

from mobilellm.data.loader import DataState, Loader
from mobilellm.data.manifest import fingerprint
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.shard_file import ends_file, mask_file
from mobilellm.data.stream import TokenStream
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.validate import validate
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError

LENGTH = 13


def folder_of(base: Path, out: Path, seed: int, share: float, shard_tokens: int) -> np.ndarray:
    """A copy of a token folder whose training tokens are `share` trained on, by chance; returns
    the bits."""
    shutil.copytree(base, out)
    manifest = json.loads((out / "manifest.json").read_text())
    stream = TokenFolder.open(base).tokens("train")
    tokens, ends = stream.read(0, len(stream)), stream.ends()
    bits = np.random.default_rng(seed).random(len(tokens)) < share
    shutil.rmtree(out / "train")
    name = manifest["sources"][0]["name"]
    writer = ShardWriter(out, "train", name, np.dtype(manifest["dtype"]), shard_tokens)
    begin = 0
    for end in ends.tolist():
        middle = (begin + end) // 2  # in two pieces, the first without bits where all are set
        writer.open_for(end - begin)
        first = bits[begin:middle]
        writer.extend(tokens[begin:middle], None if first.all() else first)
        writer.extend(tokens[middle:end], bits[middle:end])
        writer.end(0)
        begin = end
    split = manifest["splits"]["train"]
    split["shards"] = writer.close()
    split["bytes"] = 0
    manifest["fingerprint"] = fingerprint(manifest)
    (out / "manifest.json").write_bytes(orjson.dumps(manifest))
    return bits


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source

    folder = tmp_path_factory.mktemp("mask")
    lines = [json.dumps({"text": part}) for part in sample_text[:30_000].split("\n\n")]
    (folder / "speeches.jsonl").write_text("\n".join(lines))
    sources = [Source("speeches", [folder / "speeches.jsonl"])]
    prepare(sources, folder / "data", vocab_size=300, held_out=0.1)
    return folder / "data"


def state() -> DataState:
    return DataState(seed=3, epoch=0, samples=0, fingerprint="")


@pytest.mark.parametrize("shard_tokens", [1 << 20, 1001])
def test_what_is_written_is_read(documents: Path, tmp_path: Path, shard_tokens: int) -> None:
    bits = folder_of(documents, tmp_path / "data", 1, 0.6, shard_tokens)
    data = TokenFolder.open(tmp_path / "data", verify=True)
    stream = data.tokens("train")
    assert data.masked
    assert stream.masked
    assert len(stream._bounds) > (2 if shard_tokens == 1001 else 1)
    for start, count in ((0, len(bits)), (5, 1), (7, 9), (995, 20), (len(bits) - 3, 3)):
        assert stream.trained(start, count).tolist() == bits[start : start + count].tolist()
    assert stream.trained(len(bits) - 2, 10).tolist() == bits[-2:].tolist()
    assert not data.tokens("held_out").masked
    assert validate(tmp_path / "data").faults == []


def test_targets_that_are_not_trained_on_are_minus_100(documents: Path, tmp_path: Path) -> None:
    bits = folder_of(documents, tmp_path / "data", 2, 0.5, 1 << 20)
    plain, masked = (TokenFolder.open(p).tokens("train") for p in (documents, tmp_path / "data"))
    before = iter(Loader(plain, LENGTH, 8, state()))
    after = iter(Loader(masked, LENGTH, 8, state()))
    positions = Loader(plain, LENGTH, 8, state())
    taken = 0
    for step in range(2 * (len(plain) // LENGTH) // 8):  # more than an epoch: the circle closes
        (a, _), (b, _) = next(before), next(after)
        assert np.array_equal(a.inputs, b.inputs)
        assert np.array_equal(b.targets[b.targets != -100], a.targets[b.targets != -100])
        if step == 0:
            starts = positions.starts(0, np.arange(8))
            for row, start in enumerate(starts.tolist()):
                wanted = bits[(start + 1 + np.arange(LENGTH)) % len(bits)]
                assert (b.targets[row] != -100).tolist() == wanted.tolist()
        taken += int((b.targets != -100).sum())
    assert taken > 0


def test_a_mixture_keeps_the_mask_of_each_source(documents: Path, tmp_path: Path) -> None:
    folder_of(documents, tmp_path / "data", 3, 0.5, 1 << 20)
    plain, masked = (TokenFolder.open(p).tokens("train") for p in (documents, tmp_path / "data"))
    stages = [Stage(until_tokens=None, weights={"a": 1.0, "b": 1.0})]
    without = iter(Mixture({"a": plain, "b": plain}, stages, LENGTH, 8, state()))
    mixed = iter(Mixture({"a": plain, "b": masked}, stages, LENGTH, 8, state()))
    (x, _), (y, _) = next(without), next(mixed)
    assert np.array_equal(x.inputs, y.inputs)
    rows = (y.targets == -100).any(axis=1)
    assert rows.sum() == 4  # half of the samples are of the masked source
    assert np.array_equal(x.targets[~rows], y.targets[~rows])


def test_bits_that_are_all_set_change_nothing(documents: Path, tmp_path: Path) -> None:
    folder_of(documents, tmp_path / "data", 4, 2.0, 1 << 20)
    data = TokenFolder.open(tmp_path / "data")
    assert not data.masked
    assert not list((tmp_path / "data").rglob("*.mask.npy"))
    assert data.fingerprint == TokenFolder.open(documents).fingerprint


def test_a_mask_is_part_of_the_fingerprint_and_is_checked(documents: Path, tmp_path: Path) -> None:
    folder_of(documents, tmp_path / "data", 5, 0.5, 1 << 20)
    folder_of(documents, tmp_path / "other", 6, 0.5, 1 << 20)
    data, other = (TokenFolder.open(tmp_path / name) for name in ("data", "other"))
    assert len({data.fingerprint, other.fingerprint, TokenFolder.open(documents).fingerprint}) == 3
    file = next((tmp_path / "data").rglob("*.mask.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        TokenFolder.open(tmp_path / "data", verify=True)
    assert any(file.name in where for where, _ in validate(tmp_path / "data").faults)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="bytes where"):
        TokenFolder.open(tmp_path / "data")
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        TokenFolder.open(tmp_path / "data")


def test_a_bit_for_each_token_is_asked_for(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "x", np.dtype("<u2"))
    with pytest.raises(ValueError, match="3"):
        writer.add([1, 2, 3, 4], 0, trained=[True, False, True])


def test_a_folder_of_version_1_is_read(documents: Path, tmp_path: Path) -> None:
    """The held-out split was called "heldout" before version 0.2."""
    new = TokenFolder.open(documents)
    shutil.copytree(documents, tmp_path / "old")
    manifest = json.loads((documents / "manifest.json").read_text())
    (tmp_path / "old/held_out").rename(tmp_path / "old/heldout")
    manifest["version"] = 1
    manifest["splits"]["heldout"] = manifest["splits"].pop("held_out")
    for shard in manifest["splits"]["heldout"]["shards"]:
        shard["file"] = shard["file"].replace("held_out/", "heldout/")
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest))
    old = TokenFolder.open(tmp_path / "old", verify=True)
    assert old.fingerprint == new.fingerprint
    for split in ("train", "held_out"):
        a, b = old.tokens(split), new.tokens(split)
        assert np.array_equal(a.read(0, len(a)), b.read(0, len(b)))
    assert validate(tmp_path / "old").faults == []
    assert mask_file(Path("a/b.npy")).name == "b.mask.npy"
    assert ends_file(Path("a/b.npy")).name == "b.ends.npy"


def test_a_stream_without_masks_is_trained_on_whole() -> None:
    stream = TokenStream.of([np.arange(5, dtype=np.uint16), np.arange(4, dtype=np.uint16)])
    assert stream.trained(3, 4).tolist() == [True] * 4
