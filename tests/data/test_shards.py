"""Token folders: where documents end, and what is refused before anything is mapped."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm.data.manifest import fingerprint
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.stream import TokenStream
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.prepare import tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source


@pytest.fixture
def data(small_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_data, tmp_path / "d")
    return tmp_path / "d"


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_ends_are_where_the_eos_tokens_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several sources and shards, and across the border of each."""
    monkeypatch.setattr(tasks, "MIN_BYTES", 4000)
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (500,))
    for name in "ab":
        lines(
            tmp_path / f"{name}.jsonl",
            [f"{name} document {i} " + "word " * (i % 60) for i in range(120)],
        )
    prepare(
        [Source(n, [tmp_path / f"{n}.jsonl"]) for n in "ab"],
        tmp_path / "d",
        vocab_size=280,
        held_out=0.2,
    )
    folder = TokenFolder.open(tmp_path / "d", verify=True)
    for split in ("train", "held_out"):
        entry = folder.manifest["splits"][split]
        for source in (None, "a", "b"):
            stream = folder.tokens(split, source)
            tokens = stream.read(0, len(stream))
            assert np.array_equal(stream.ends(), np.flatnonzero(tokens == folder.eos_id) + 1)
        assert len(folder.tokens(split).ends()) == entry["documents"]
        assert len(entry["shards"]) > 3
    assert len(folder.tokens("train")) == sum(len(folder.tokens("train", name)) for name in "ab")


def test_reading_across_borders_is_slicing() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 60_000, 500).astype(np.uint16)
    stream = TokenStream.of(np.split(whole, [0, 7, 8, 8, 200, 499]))
    for _ in range(500):
        start, count = rng.integers(0, 520), rng.integers(0, 300)
        assert np.array_equal(stream.read(int(start), int(count)), whole[start : start + count])


def test_the_narrowest_type_is_chosen() -> None:
    assert [token_dtype(size).str for size in (1, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]


def test_wide_tokens_survive(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "s", np.dtype("<u4"))
    writer.add([70_000, 5, (1 << 32) - 1], 3)
    assert np.load(tmp_path / writer.close()[0]["file"]).tolist() == [70_000, 5, (1 << 32) - 1]


def rewrite(data: Path, change: Any) -> None:
    """Edit the manifest and put a matching fingerprint in, so that only the edit can be what is
    refused."""
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest, manifest["splits"]["train"]["shards"][0])
    manifest["fingerprint"] = fingerprint(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))


EDITS = {
    "out of the folder": lambda m, s: s.update(file="train/../../secret.npy"),
    "absolute": lambda m, s: s.update(file="/etc/passwd"),
    "another split": lambda m, s: s.update(file="held_out/text-00000.npy"),
    "not an array": lambda m, s: s.update(file="train/text-00000.bin"),
    "more tokens": lambda m, s: s.update(tokens=s["tokens"] + 1),
    "tokens true": lambda m, s: s.update(tokens=True),
    "negative": lambda m, s: s.update(documents=-1),
    "fewer documents": lambda m, s: s.update(documents=0),
    "more text": lambda m, s: s.update(bytes=s["bytes"] + 1),
    "sum of tokens": lambda m, s: m["splits"]["train"].update(tokens=5),
    "unknown source": lambda m, s: s.update(source="elsewhere"),
    "twice": lambda m, s: m["splits"]["train"].update(
        {key: 2 * s[key] for key in ("documents", "tokens", "bytes")}, shards=[s, s]
    ),
    "a count that is true": lambda m, s: [
        part.update(bytes=True) for part in (s, m["splits"]["train"])
    ],
    "a negative count": lambda m, s: [part.update(bytes=-5) for part in (s, m["splits"]["train"])],
    "bos without an id": lambda m, s: m.update(bos=True),
    "eos a word": lambda m, s: m.update(eos="yes"),
    "eos out of range": lambda m, s: m.update(eos_id=300),
    "seed a word": lambda m, s: m.update(seed="x"),
    "wider": lambda m, s: m.update(dtype="<u4"),
    "huge vocabulary": lambda m, s: m["tokenizer"].update(vocab_size=1 << 40),
    "no sources": lambda m, s: m.update(sources=5),
    "no rule": lambda m, s: m.update(held_out=3),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(data: Path, edit: str) -> None:
    rewrite(data, EDITS[edit])
    with pytest.raises(UserError, match=r"manifest\.json: damaged or edited: "):
        TokenFolder.open(data)


def test_a_rewritten_manifest_is_not_refused_for_being_rewritten(data: Path) -> None:
    rewrite(data, lambda manifest, shard: manifest.update(seed=-3))
    TokenFolder.open(data, verify=True)


def test_manifests_are_checked_under_python_o_too(data: Path) -> None:
    rewrite(data, EDITS["out of the folder"])
    code = (
        "import sys, pathlib; from mobilellm.data.token_folder import TokenFolder; "
        "TokenFolder.open(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", code, str(data)], capture_output=True, text=True, check=False
    )
    assert "a shard named 'train/../../secret.npy'" in done.stderr


@pytest.mark.parametrize(
    "name", ["train/text-00000.npy", "held_out/text-00000.npy", "train/text-00000.ends.npy"]
)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(", b"["),
        (b"'<u", b"'<i"),
        (b"False", b"True "),
        (b"NUMPY\x01", b"NUMPY\x02"),
        (b"v\x00{", b"u\x00{"),
    ],
)
def test_a_header_that_lies_is_refused_at_opening(
    data: Path, name: str, old: bytes, new: bytes
) -> None:
    content = (data / name).read_bytes()
    assert old in content[:128]
    (data / name).write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match=f"{name}: not the array"):
        TokenFolder.open(data)


def test_ends_that_were_changed_are_found(data: Path) -> None:
    path = data / "train/text-00000.ends.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    TokenFolder.open(data)
    with pytest.raises(UserError, match="checksum differs"):
        TokenFolder.open(data, verify=True)


def test_a_disk_that_fills_up_while_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second write of a shard fails, as a full disk does in the middle."""
    (tmp_path / "t.txt").write_text("words " * 1000)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.writes = file, 0

        def write(self, content: bytes) -> int:
            self.writes += 1
            if self.writes == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(content))

    import mobilellm.data.writer as shards

    real = open
    monkeypatch.setattr(
        shards,
        "open",
        lambda path, mode: Full(real(path, mode)) if "w" in mode else real(path, mode),
        raising=False,
    )
    with pytest.raises(UserError, match="no space left while writing"):
        prepare([Source("s", [tmp_path / "t.txt"])], tmp_path / "d", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]
