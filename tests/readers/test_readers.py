"""Readers of file types: each divides a file and reads it; a new one is an entry in the table."""

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.prepare import tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.readers.reader import (
    Reader,
    ReadSettings,
    Record,
    Span,
    spans_between,
)
from mobilellm.readers.table import READERS, reader_of, records, spans, text_size

TEXTS = [f"document number {i}, of {'many ' * (i % 9)}words" for i in range(400)]


def write(folder: Path, name: str) -> Path:
    """TEXTS as a file of the type that the name says."""
    path = folder / name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=30)
        return path
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if name.endswith(".txt"):
        data = "".join(TEXTS).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("a.txt", "text"),
        ("README", "text"),
        ("a.MD.gz", "text"),
        ("a.jsonl", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.png", None),
    ],
)
def test_the_name_of_a_file_says_which_reader_reads_it(name: str, reader: str | None) -> None:
    found = reader_of(Path(name))
    assert (found.name if found else None) == reader


@pytest.mark.parametrize(
    ("name", "count"),
    [("a.txt", 1), ("a.jsonl", 8), ("a.jsonl.gz", 2), ("a.jsonl.zst", 2), ("a.parquet", 6)],
)
def test_every_record_is_in_exactly_one_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """The spans are tried in reverse order, as processes may do them."""
    from mobilellm.streams import compression

    monkeypatch.setattr(compression, "BLOCK", 256)
    path = write(tmp_path, name)
    divided = spans(path, path.stat().st_size, 2500)
    assert len(divided) >= count
    settings = ReadSettings()
    whole = list(records(path, Span(), settings))
    parts = [list(records(path, span, settings)) for span in reversed(divided)]
    found = [record for part in reversed(parts) for record in part]
    assert [(r.key, r.text) for r in found] == [(r.key, r.text) for r in whole]
    assert [r.text for r in whole] == (["".join(TEXTS)] if name == "a.txt" else TEXTS)
    assert len({r.key for r in whole}) == len(whole)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (3, 2, 1, 0)])
def test_spans_in_order_unpack_a_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """Whoever goes on behind a span that it has read goes on from there, and gets the same."""
    from mobilellm.readers import lines
    from mobilellm.streams import compression

    monkeypatch.setattr(compression, "BLOCK", 256)
    path, opened = tmp_path / "a.jsonl.gz", 0
    rows = [json.dumps({"text": f"{i} " * (1 + i % 400)}) + "\n" for i in range(400)]
    path.write_bytes(gzip.compress("".join(rows).encode(), compresslevel=1))
    real = lines.unpacked

    def counted(path: Path) -> Iterator[tuple[int, bytes]]:
        nonlocal opened
        opened += 1
        return real(path)

    monkeypatch.setattr(lines, "unpacked", counted)
    size = path.stat().st_size
    divided = spans_between([i * size // 4 for i in range(4)])
    settings = ReadSettings()
    parts = {i: list(records(path, divided[i], settings)) for i in order}
    found = [(r.key, r.text) for i in range(4) for r in parts[i]]
    assert found == [(r.key, r.text) for r in records(path, Span(), settings)]
    assert len(found) == 400
    assert all(parts.values())
    falls = sum(b < a for a, b in itertools.pairwise(order))
    assert opened == 1 + falls + 1  # one more for the whole


def test_a_file_that_changed_is_unpacked_anew(tmp_path: Path) -> None:
    path, settings = tmp_path / "a.jsonl.gz", ReadSettings()

    def write(word: str) -> int:
        lines = b"".join(b'{"text": "%s %06d"}\n' % (word.encode(), i * i) for i in range(40_000))
        path.write_bytes(gzip.compress(lines, mtime=0))
        return path.stat().st_size

    middle = write("one") // 2
    assert list(records(path, Span(0, middle), settings))
    write("other")
    found = list(records(path, Span(middle), settings))
    assert found
    assert all(record.text is not None and record.text[:5] == "other" for record in found)


def test_a_file_of_lines_may_be_divided_at_any_byte(tmp_path: Path) -> None:
    """Within a line, just before a line's end, and just after it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n\n{"text": "three"}')
    settings = ReadSettings()
    for cut in range(path.stat().st_size + 1):
        parts = [records(path, span, settings) for span in (Span(0, cut), Span(cut))]
        assert [r.text for part in parts for r in part] == ["one", "two", "three"], cut


def test_a_new_file_type_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paragraphs, a document each: divided, read and named in errors by its entry alone."""

    def paragraph_spans(path: Path, size: int, wanted: int) -> list[Span]:
        return spans_between(list(range(0, len(path.read_text().split("\n\n")), 50)))

    def paragraphs(path: Path, span: Span, settings: ReadSettings) -> Iterator[Record]:
        for number, text in enumerate(path.read_text().split("\n\n")):
            if number in span:
                yield Record(f"{path}: paragraph {number}", number, text=text)

    path = tmp_path / "book.par"
    path.write_text("\n\n".join(TEXTS))
    sources = [Source("book", [path])]
    with pytest.raises(UserError, match=r"book\.par: of a kind that is not read"):
        prepare(sources, tmp_path / "d", vocab_size=300)
    entry = Reader(
        "paragraphs",
        (".par",),
        "one document a paragraph",
        paragraph_spans,
        paragraphs,
        expansion=2,
    )
    monkeypatch.setitem(READERS, "paragraphs", entry)
    monkeypatch.setattr(tasks, "MIN_BYTES", 1000)
    assert text_size(path, 100) == 200
    assert len(tasks.plan(sources)) == 8
    manifest = prepare(sources, tmp_path / "d", vocab_size=300, held_out=0.1)
    assert manifest["sources"][0]["documents"] == len(TEXTS)
    folder = TokenFolder.open(tmp_path / "d", verify=True)
    found = []
    for split in ("train", "held_out"):
        stream, start = folder.tokens(split), 0
        for end in stream.ends().tolist():
            found.append(folder.tokenizer().decode(stream.read(start, end - 1 - start).tolist()))
            start = end
    assert sorted(found) == sorted(TEXTS)
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.par \(one document a paragraph\)"):
        prepare([Source("x", [tmp_path / "image.png"])], tmp_path / "e", vocab_size=300)
