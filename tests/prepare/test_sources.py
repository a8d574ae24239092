"""Sources and what `prepare` says of them: names, checksums, progress, memory."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from mobilellm.errors import UserError
from mobilellm.prepare import task_run
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.streams import compression
from mobilellm.tokenizer.tokenizer import train_bpe


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("some words here. " * 500)
    return tmp_path / "t.txt"


def test_two_sources_of_one_name_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two sources named 'a'"):
        prepare([Source("a", [text]), Source("a", [text])], tmp_path / "d", vocab_size=300)
    with pytest.raises(UserError, match="no text given"):
        prepare([], tmp_path / "d", vocab_size=300)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "a b", "a\n"])
def test_a_name_that_is_no_file_name_is_refused(text: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="a source named"):
        prepare([Source(name, [text])], tmp_path / "d", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_the_manifest_holds_checksums_of_files_and_of_sources(tmp_path: Path) -> None:
    (tmp_path / "in/deeper").mkdir(parents=True)
    for name in ("b.txt", "a.md", "deeper/chapter", ".hidden.txt", "image.png"):
        (tmp_path / "in" / name).write_text(f"the text of {name} " * 50)
    manifest = prepare(
        [Source("s", [tmp_path / "in"])], tmp_path / "d", vocab_size=300, held_out=0.4
    )
    (source,) = manifest["sources"]
    assert [file["path"] for file in source["files"]] == ["a.md", "b.txt", "chapter"]
    digests = [
        hashlib.sha256((tmp_path / "in" / n).read_bytes()).hexdigest()
        for n in ("a.md", "b.txt", "deeper/chapter")
    ]
    assert [file["sha256"] for file in source["files"]] == digests
    assert (
        source["sha256"] == hashlib.sha256("".join(f"{d}\n" for d in digests).encode()).hexdigest()
    )
    assert source["documents"] == 3


def test_progress_ends_at_the_total_and_never_goes_back(text: Path, tmp_path: Path) -> None:
    size = text.stat().st_size
    for tokenizer, passes in ((None, 2), (train_bpe(["words"], 300), 1)):
        seen: list[tuple[float, float]] = []
        prepare(
            [Source("s", [text])],
            tmp_path / f"d{passes}",
            tokenizer=tokenizer,
            vocab_size=300,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == sorted(seen)
        assert seen[-1] == (passes * size, passes * size)
        assert len(seen) >= passes


def test_a_compressed_file_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times the text takes no more memory."""
    monkeypatch.setattr(compression, "UNPACKED", 1 << 16)
    monkeypatch.setattr(task_run, "BATCH_CHARACTERS", 1 << 16)
    tokenizer = train_bpe(["the quick brown fox 0123456789 " * 10], 300)
    peaks = []
    for name, count in (("warm", 10), ("small", 300), ("large", 900)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            for i in range(count):
                file.write(json.dumps({"text": f"the quick brown fox {i} " * 300}) + "\n")
        tracemalloc.start()
        prepare(
            [Source("a", [tmp_path / f"{name}.jsonl.gz"])], tmp_path / name, tokenizer=tokenizer
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', ":2: broken JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ":2: broken JSON .*UTF-8"),
        (b'{"text": "a"}\n{"text": "a\0"}\n', ":2: broken JSON"),
        (b'{"text": "a"}\n{"text": null}\n', ":2: field 'text' is NoneType"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jsonl{words}"):
        prepare([Source("a", [tmp_path / "a.jsonl"])], tmp_path / "d", vocab_size=300)


def test_a_text_too_short_to_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(UserError, match=r"short\.txt: a text of 1 characters"):
        prepare([Source("a", [tmp_path / "short.txt"])], tmp_path / "d", vocab_size=300)
