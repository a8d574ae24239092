"""Files as people have them: every kind gives the same documents, and none is passed over."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source, parse_sources
from mobilellm.readers import json_values, text
from mobilellm.readers import parquet as parquet_reader
from mobilellm.readers.reader import ReadSettings, Span
from mobilellm.readers.table import reader_of, records, rows
from mobilellm.streams import compression

TEXTS = [f'Document {i}: "naïve" ☃,\n\tsaid {"x" * (i % 40)}.' for i in range(60)]


def lines() -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)
    ).encode()


def table(delimiter: str) -> bytes:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=delimiter)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    return made.getvalue().encode()


def parquet(form: str) -> bytes:
    pa = pytest.importorskip("pyarrow")
    column = {
        "plain": lambda: pa.array(TEXTS),
        "dictionary": lambda: pa.array(TEXTS).dictionary_encode(),
        "binary": lambda: pa.array([text.encode() for text in TEXTS], pa.binary()),
        "large": lambda: pa.array(TEXTS, pa.large_string()),
    }[form]()
    made = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.table({"text": column}), made, row_group_size=25
    )
    return made.getvalue()


def objects(separator: str, indent: int | None = None) -> str:
    made = (json.dumps({"id": i, "text": text}, indent=indent) for i, text in enumerate(TEXTS))
    return separator.join(made)


KINDS: dict[str, Callable[[], bytes]] = {
    "lines.json": lines,
    "lines.jsonl.bz2": lambda: bz2.compress(lines()),
    "two-streams.jsonl.bz2": lambda: bz2.compress(lines()[:1000]) + bz2.compress(lines()[1000:]),
    "lines.jsonl.xz": lambda: lzma.compress(lines()),
    "padded.jsonl.xz": lambda: lzma.compress(lines()) + lzma.compress(b"") + b"\0" * 8,
    "lines.json.gz": lambda: gzip.compress(lines()),
    "array.json": lambda: f"[{objects(',')}]".encode(),
    "array-over-lines.json.gz": lambda: gzip.compress(f"[\n{objects(' , ')}\n]\n".encode()),
    "over-lines.json": lambda: objects("\n", indent=2).encode(),
    "mark.json": lambda: b"\xef\xbb\xbf" + f"[{objects(',')}]".encode(),
    "mark.jsonl": lambda: b"\xef\xbb\xbf" + lines(),
    "mark.jsonl.gz": lambda: gzip.compress(b"\xef\xbb\xbf" + lines()),
    "table.csv": lambda: table(","),
    "mark.csv.xz": lambda: lzma.compress(b"\xef\xbb\xbf" + table(",")),
    "table.tsv.gz": lambda: gzip.compress(table("\t")),
    **{
        f"{form}.parquet": (lambda form=form: parquet(form))
        for form in ("plain", "dictionary", "binary", "large")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in pieces that end anywhere."""
    path = tmp_path / name
    path.write_bytes(KINDS[name]())
    for size in (compression.UNPACKED, 37):
        monkeypatch.setattr(compression, "UNPACKED", size)
        found = list(records(path, Span(), ReadSettings()))
        assert [record.fault for record in found if record.fault] == []
        assert [record.text for record in found] == TEXTS
        assert len({record.key for record in found}) == len(TEXTS)


def test_a_json_file_of_lines_is_divided_and_an_array_is_not(tmp_path: Path) -> None:
    for name, count in (("lines.json", 4), ("array.json", 1)):
        (tmp_path / name).write_bytes(KINDS[name]())
        assert len(json_values.spans(tmp_path / name, 4000, 1000)) == count


@pytest.mark.parametrize(
    ("name", "content", "words", "documents"),
    [
        ("cut.json", b'[{"text": "a"}, {"text": "b"}', "value 3: broken JSON", 2),
        ("bad.json", b'[{"text": "a"}, {text: "b"}, {"text": "c"}]', "value 2: broken JSON", 1),
        ("comma.json", b'[{"text": "a"} {"text": "b"}]', "value 2: broken JSON (no comma", 1),
        ("end.json", b'[{"text": "a"},]', "value 2: broken JSON", 1),
        ("more.json", b'[{"text": "a"}] {"text": "b"}', "behind the array's end", 1),
        ("half.json", b'[{"text": "\\ud800"}]', "value 1: broken JSON", 0),
        ("deep.json", b"[" * 100_000, "value 1: broken JSON", 0),
        ("squad.json", b'{"data": [{"text": "a"}]}', ":1: no field 'text'", 0),
        ("open.csv", b'id,text\n1,"a"\n2,"b\n3,c\n', "row 2 (line 4): unexpected end", 1),
        ("wide.csv", b"id,text\n1,a\n2,b,c\n3,d\n", "row 2 (line 3): 3 fields", 2),
        ("other.csv", b"id,body\n1,a\n", "no column 'text' (found id, body)", 0),
        ("nan.jsonl", b'{"text": NaN}\n{"text": "b"}\n', ":1: field 'text' is float", 1),
        ("nan-half.jsonl", b'{"s": NaN, "text": "\\ud800"}\n{"text": "b"}\n', ":1: broken JSON", 1),
        ("cut.jsonl.xz", lzma.compress(lines())[:-9], "damaged or cut-off xz", None),
        ("cut.jsonl.bz2", bz2.compress(lines())[:-9], "damaged or cut-off bzip2", None),
        ("fake.jsonl.xz", b"hello", "damaged or cut-off xz", None),
        ("tail.jsonl.bz2", bz2.compress(lines()) + b"tail", "damaged or cut-off bzip2", None),
    ],
)
def test_what_is_broken_is_named_and_the_rest_is_read(
    tmp_path: Path, name: str, content: bytes, words: str, documents: int | None
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found = list(records(path, Span(), ReadSettings()))
    (fault,) = [record.fault for record in found if record.fault]
    assert words in str(fault)
    assert str(path) in str(fault)
    assert "\n" not in str(fault)
    if documents is not None:
        assert len(found) == documents + 1


def test_nan_in_another_field_is_no_fault_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "score": float("nan")}) + "\n" for t in TEXTS))
    assert [record.text for record in records(path, Span(), ReadSettings())] == TEXTS


def test_a_mark_of_a_text_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfHello \xef\xbb\xbf")
    (record,) = records(tmp_path / "a.txt", Span(), ReadSettings())
    assert record.text == "Hello \ufeff"


@pytest.mark.parametrize(
    ("separator", "content", "documents"),
    [
        ("<|end|>", "one\n<|end|>\ntwo\n\n more\n<|end|>\n", ["one", "two\n\n more"]),
        ("<|endoftext|>", "one<|endoftext|><|endoftext|>two", ["one", "", "two"]),
        ("<|endoftext|>", "no separator", ["no separator"]),
        ("blank-lines", "\n\none\nmore\n \n\n\ntwo\n\r\n 3\r\n\r\n", ["one\nmore", "two", "3"]),
    ],
)  # fmt: skip
def test_a_separator_divides_a_text_file(
    tmp_path: Path,
    separator: str,
    content: str,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    for size in (1 << 20, 1, 5):
        monkeypatch.setattr(compression, "UNPACKED", size)
        found = list(records(tmp_path / "a.txt", Span(), ReadSettings(separator=separator)))
        assert [record.text for record in found] == documents
        assert len({record.key for record in found}) == len(found)


def test_a_document_without_its_separator_is_a_fault_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(compression, "UNPACKED", 50)
    (tmp_path / "a.txt").write_text("one|" + "x" * 500 + "|two")
    found = list(records(tmp_path / "a.txt", Span(), ReadSettings(separator="|")))
    assert [record.text for record in found] == ["one", None, "two"]
    assert "document 2: more than 100 characters without the separator" in str(found[1].fault)


def test_a_separator_without_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines())
    with pytest.raises(UserError, match="--separator is of text files"):
        prepare([Source("a", [tmp_path / "a.jsonl"])], tmp_path / "d", separator="|")


class TestFolders:
    """What a folder holds is read, or named and counted."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "in"
        (folder / ".git").mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        (folder / "linked").symlink_to(tmp_path / "elsewhere")
        for name in ("README.md", "LICENSE", "license.txt", ".hidden.txt", ".git/config.txt"):
            (folder / name).write_text("not to be trained on " * 20)
        for name in ("a.png", "b.exe", "dataset_infos.json"):
            (folder / name).write_text("{}")
        (folder / "readme-novel.jsonl").write_bytes(lines())
        (folder / "c.json.gz").write_bytes(gzip.compress(lines()))
        (folder / "d.csv.bz2").write_bytes(bz2.compress(table(",")))
        return folder

    def test_all_is_read_or_named(self, folder: Path, tmp_path: Path) -> None:
        said: list[str] = []
        manifest = prepare(
            [Source("s", [folder])], tmp_path / "d", vocab_size=300, held_out=0.1, say=said.append
        )
        assert manifest["sources"][0]["documents"] == 3 * len(TEXTS)
        left = manifest["files_left_out"]
        assert left["count"] == 9
        assert left["why"] == {
            "hidden": 2,
            "about the data, not text": 4,
            "of a kind that is not read": 2,
            "no regular file, or a link to a folder": 1,
        }
        assert {Path(name).name for name, _ in left["first"]} == {
            "README.md", "LICENSE", "license.txt", ".hidden.txt", "config.txt", "a.png", "b.exe",
            "dataset_infos.json", "linked",
        }  # fmt: skip
        spoken = [line for line in said if "left out" in line]
        assert len(spoken) == 4
        assert any(
            "2 files left out, of a kind that is not read: a.png, b.exe" in s for s in spoken
        )
        train = TokenFolder.open(tmp_path / "d").tokens("train")
        everything = (
            TokenFolder.open(tmp_path / "d").tokenizer().decode(train.read(0, len(train)).tolist())
        )
        assert "not to be trained on" not in everything

    def test_a_file_that_is_named_is_read(self, folder: Path, tmp_path: Path) -> None:
        sources = parse_sources([str(folder / "README.md")])
        manifest = prepare(sources, tmp_path / "d", vocab_size=300, held_out=0.1)
        assert manifest["sources"][0]["files"][0]["path"] == "README.md"
        assert "files_left_out" not in manifest

    def test_a_folder_of_nothing_that_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in/README").write_text("words " * 50)
        with pytest.raises(UserError, match="holds no text"):
            prepare([Source("s", [tmp_path / "in"])], tmp_path / "d", vocab_size=300)


def test_rows_of_a_table_are_those_of_its_lines(tmp_path: Path) -> None:
    """Nested lists of structs, with fields that some rows lack."""
    pa = pytest.importorskip("pyarrow")
    talks = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        | ({} if i % 2 else {"id": i})
        for i in range(30)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    pytest.importorskip("pyarrow.parquet").write_table(
        pa.Table.from_pylist(talks), tmp_path / "a.parquet", row_group_size=7
    )
    assert [row.value for row in rows(tmp_path / "a.parquet")] == talks
    assert [row.value for row in rows(tmp_path / "a.jsonl")] == talks
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt: text without fields"):
        list(rows(tmp_path / "a.txt"))


def test_the_sizes_of_pages_are_those_that_were_written(tmp_path: Path) -> None:
    """Against what pyarrow says of whole columns, with and without a dictionary, of both
    versions of data pages."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    from mobilellm.readers.parquet_pages import page_sizes

    texts = [f"row {i} {'abc' * (i % 300)}" for i in range(3000)]
    for dictionary in (True, False):
        for version in ("1.0", "2.0"):
            path = tmp_path / "a.parquet"
            pq.write_table(
                pa.table({"n": list(range(3000)), "text": texts}), path, compression="zstd",
                use_dictionary=dictionary, data_page_size=4096, write_batch_size=8,
                dictionary_pagesize_limit=1 << 24,
                data_page_version=version,
            )  # fmt: skip
            column = pq.ParquetFile(path).metadata.row_group(0).column(1)
            start = column.dictionary_page_offset or column.data_page_offset
            with open(path, "rb") as file:
                found = page_sizes(file, start, start + column.total_compressed_size)
            total = sum(map(len, texts)) + 4 * len(texts)
            assert (found.dictionary == total) == dictionary
            assert found.page < column.total_uncompressed_size
            if not dictionary:
                assert 4096 <= found.page < 20_000
                assert 800 < found.value < 1000


def test_a_dictionary_that_is_too_large_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet_reader, "MAX_PAGE", 1 << 20)
    path = tmp_path / "a.parquet"
    texts = [f"{i:02d}{'x' * 70_000}" for i in range(16)]
    pq.write_table(
        pa.table({"text": texts}), path, compression="zstd", dictionary_pagesize_limit=1 << 30
    )
    assert path.stat().st_size < 1 << 14
    (record,) = records(path, Span(), ReadSettings())
    assert "has a page of 1,120,096 bytes in column 'text', the limit is 1,048,576" in str(
        record.fault
    )


def test_names_say_which_reader() -> None:
    for name, reader in (
        ("a.json.xz", "json"), ("a.TSV", "table"), ("a.csv.zst", "table"), ("a.jsonl.bz2", "jsonl"),
        ("a.bz2", "text"), ("a.parquet.xz", None),
    ):  # fmt: skip
        found = reader_of(Path(name))
        assert (found.name if found else None) == reader
