"""The prepared bytes of inputs that were read from the beginning stay what they were.

The digests were recorded before readers and streams had rooms of their own.
"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mobilellm.prepare import tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.tokenizer.tokenizer import train_bpe


def rows(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)
    ).encode()


def raw_zstd(data: bytes) -> bytes:
    """A frame of raw blocks, the same whatever the compressor's version."""
    blocks = [data[i : i + 9000] for i in range(0, len(data), 9000)]
    framed = b"".join(
        (len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") + block
        for number, block in enumerate(blocks)
    )
    return b"\x28\xb5\x2f\xfd\x00\x38" + framed


def source(folder: Path, kind: str, sample_text: str) -> Path:
    texts = [sample_text[i : i + 500] for i in range(0, 150_000, 500)]
    path = folder / f"a.{kind}"
    if kind == "txt":
        path.write_text(sample_text[:80_000])
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress((sample_text[:90_000] + "naïve ☃ 漢字").encode(), mtime=0))
    elif kind == "jsonl":
        path.write_bytes(rows(texts))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(rows(texts), compresslevel=0, mtime=0))
    elif kind == "jsonl.zst":
        pytest.importorskip("zstandard")
        path.write_bytes(raw_zstd(rows(texts)))
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pa.table({"text": texts}), path, row_group_size=40
        )
    elif kind == "folder":
        path.mkdir()
        for i, text in enumerate(texts[:40]):
            (path / f"{i:02d}.md").write_text(text)
    return path


def digest(folder: Path) -> str:
    """Of all shards, by name and content."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.npy")):
        found.update(f"{path.relative_to(folder)}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


GOLDEN = {
    "txt": ("c992a721fd8d6d8d", "11148d99aad71168"),
    "txt.gz": ("b178795e92973e28", "24be21c795907216"),
    "jsonl": ("c8931d1148b7e389", "fd5a1417f2da5aac"),
    "jsonl.gz": ("c8931d1148b7e389", "e059bec9c2e80905"),
    "jsonl.zst": ("c8931d1148b7e389", "b83b36f8d57ff051"),
    "parquet": ("ac7651d72efaa290", "88f70dbce948c2d3"),
    "folder": ("73dedc6a3e5f1ac9", "57830ad2e017e227"),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_prepared_bytes_are_the_golden_ones(
    tmp_path: Path, sample_text: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer that is trained, and, divided into many tasks, with one that is given."""
    path = source(tmp_path, kind, sample_text)
    options: dict[str, Any] = {"held_out": 0.1, "library": "tokenizers"}
    prepare([Source("a", [path])], tmp_path / "one", vocab_size=400, **options)
    monkeypatch.setattr(tasks, "MIN_BYTES", 20_000)
    given = train_bpe([sample_text[:50_000]], 400)
    prepare([Source("a", [path])], tmp_path / "many", tokenizer=given, **options)
    assert (digest(tmp_path / "one"), digest(tmp_path / "many")) == GOLDEN[kind]
