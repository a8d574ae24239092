"""Text to tokens on disk: what goes in comes out, and what is bad is named."""

import errno
import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mobilellm.data.manifest import fingerprint
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source, parse_sources
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


def documents_of(folder: TokenFolder, split: str) -> list[str]:
    tokens = folder.tokens(split)
    everything = tokens.read(0, len(tokens)).tolist()
    texts, current = [], []
    for token in everything:
        if token == folder.eos_id:
            texts.append(folder.tokenizer().decode(current))
            current = []
        else:
            current.append(token)
    assert not current
    return texts


def test_a_single_text_is_split_as_nanogpt_splits_it(tmp_path: Path, sample_text: str) -> None:
    (tmp_path / "t.txt").write_text(sample_text)
    manifest = prepare(
        [Source("t", [tmp_path / "t.txt"])], tmp_path / "d", vocab_size=1000, held_out=0.1
    )
    data = TokenFolder.open(tmp_path / "d", verify=True)
    cut = int(len(sample_text) * 0.9)
    assert documents_of(data, "train") == [sample_text[:cut]]
    assert documents_of(data, "held_out") == [sample_text[cut:]]
    assert manifest["held_out"]["rule"] == "tail"
    assert data.text_bytes("train") == len(sample_text[:cut].encode())
    assert data.vocab_size == 1000


def test_documents_are_held_out_whole_and_none_is_lost(tmp_path: Path) -> None:
    texts = [f"Document {i}: déjà vu, naïve ☃ {'x' * (i % 50)}\n" for i in range(400)]
    lines(tmp_path / "a.jsonl", texts[:250])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(lines(tmp_path / "b.tmp", texts[250:]).read_bytes())
    manifest = prepare(
        parse_sources([str(tmp_path / "a.jsonl"), f"bee={tmp_path / 'b.jsonl.gz'}"]),
        tmp_path / "d",
        vocab_size=400,
        held_out=0.1,
    )
    data = TokenFolder.open(tmp_path / "d", verify=True)
    train, held_out = documents_of(data, "train"), documents_of(data, "held_out")
    assert sorted(train + held_out) == sorted(texts)
    assert 15 < len(held_out) < 75
    assert [s["name"] for s in manifest["sources"]] == ["a", "bee"]
    assert sum(s["documents"] for s in manifest["sources"]) == 400
    assert sum(s["bytes"] for s in manifest["sources"]) == sum(len(t.encode()) for t in texts)
    assert sum(split["tokens"] for split in manifest["splits"].values()) == sum(
        s["tokens"] for s in manifest["sources"]
    )


def test_the_same_text_gives_the_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [f"text number {i}" for i in range(200)])
    sources = [Source("a", [tmp_path / "a.jsonl"])]
    one, two, other = (
        prepare(sources, tmp_path / name, vocab_size=300, held_out=0.1, seed=s)
        for name, s in (("1", 0), ("2", 0), ("3", 1))
    )
    assert one == two
    assert one["fingerprint"] != other["fingerprint"]
    for path in (tmp_path / "1").rglob("*"):
        if path.is_file():
            assert (
                path.read_bytes()
                == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()
            )


def test_a_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    """Two texts that differ only in their held-out tails train the same tokenizer."""
    for name, tail in (("a", "zebra " * 100), ("b", "quokka" * 100)):
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat. " * 225 + tail)
    ids = [
        prepare([Source("t", [tmp_path / f"{n}.txt"])], tmp_path / n, vocab_size=300, held_out=0.1)[
            "tokenizer"
        ]["sha256"]
        for n in "ab"
    ]
    assert ids[0] == ids[1]


def test_few_documents_leave_neither_side_empty(tmp_path: Path) -> None:
    for seed in range(20):
        lines(tmp_path / "a.jsonl", ["one", "two", "three"])
        out = tmp_path / f"d{seed}"
        manifest = prepare(
            [Source("a", [tmp_path / "a.jsonl"])], out, vocab_size=260, held_out=0.5, seed=seed
        )
        assert all(split["documents"] for split in manifest["splits"].values())


def test_a_source_that_is_a_single_text_is_cut_beside_others_that_are_not(
    tmp_path: Path, sample_text: str
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " + sample_text[:4000])
    lines(tmp_path / "c.jsonl", [f"document {i}" for i in range(50)])
    books = [Source(name, [tmp_path / f"{name}.txt"]) for name in "ab"]
    for out, sources, rule in (
        ("d", books, "tail"),
        ("e", [*books, Source("c", [tmp_path / "c.jsonl"])], "documents"),
    ):
        manifest = prepare(sources, tmp_path / out, vocab_size=300, held_out=0.1)
        assert manifest["held_out"] == {"rule": rule, "fraction": 0.1, "tails": ["a", "b"]}
        folder = TokenFolder.open(tmp_path / out)
        for name in "ab":
            own = [folder.tokens(split, name) for split in ("train", "held_out")]
            texts = [
                folder.tokenizer().decode(stream.read(0, len(stream) - 1).tolist())
                for stream in own
            ]
            assert "".join(texts) == (tmp_path / f"{name}.txt").read_text()
            assert len(texts[1]) == pytest.approx(400, abs=2)


def test_bos_and_eos_are_put_where_asked(tmp_path: Path, shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer/mistral-v1-32k")
    lines(tmp_path / "a.jsonl", ["Hello there.", "General Kenobi!"])
    source = [Source("a", [tmp_path / "a.jsonl"])]
    prepare(source, tmp_path / "d", tokenizer=tokenizer, held_out=0.5, bos=True)
    stream = TokenFolder.open(tmp_path / "d").tokens("train")
    tokens = stream.read(0, len(stream))
    assert tokens[0] == 1
    assert tokens[-1] == 2
    manifest = prepare(source, tmp_path / "e", tokenizer=tokenizer, held_out=0.5, eos=False)
    assert (manifest["bos"], manifest["eos"]) == (False, False)
    stream = TokenFolder.open(tmp_path / "e").tokens("train")
    assert 2 not in stream.read(0, len(stream))


def test_a_document_that_spells_a_special_token_does_not_get_it(tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text <|endoftext|> more"], 300)
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode(tokenizer.encode("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_byte_level_bpe_is_lossless() -> None:
    tokenizer = train_bpe(["hello world"], 280)
    for text in ("", " ", "\n\n\t x", "naïve ☃ 😀 \u0000 \ufffd", "한국어"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_saved_tokenizer_is_the_same_and_loads_in_transformers(
    tmp_path: Path, sample_text: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_bpe([sample_text[:50_000]], 500)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.sha256, again.eos_id, again.bos_id, again.vocab_size) == (
        tokenizer.sha256,
        tokenizer.eos_id,
        None,
        500,
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(sample_text[:5000], add_special_tokens=False).input_ids == tokenizer.encode(
        sample_text[:5000]
    )
    assert theirs.eos_token_id == tokenizer.eos_id


def test_shards_are_plain_npy_with_document_ends(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "s", np.dtype("<u2"), shard_tokens=10)
    for document in ([1, 2, 3], [4] * 6, [5, 6], [7] * 25):
        writer.add(document, len(document))
    shards = writer.close()
    assert [s["tokens"] for s in shards] == [9, 2, 25]
    arrays = [np.load(tmp_path / s["file"]) for s in shards]
    assert np.concatenate(arrays).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 6, *[7] * 25]
    assert [np.load((tmp_path / s["file"]).with_suffix(".ends.npy")).tolist() for s in shards] == [
        [3, 9],
        [2],
        [25],
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["no text"]),
        ("short.txt", b"x", ["too short"]),
        ("binary.txt", b"\x7fELF\xff\xfe", ["not UTF-8", "byte 4"]),
        ("nul.txt", b"abc\0def" * 100, ["NUL", "character 3"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', [":2", "broken JSON"]),
        (
            "field.jsonl",
            b'{"content": "a"}\n',
            [":1", "no field 'text'", "content", "--text-field"],
        ),
        ("type.jsonl", b'{"text": "a"}\n{"text": 5}\n', [":2", "int"]),
        ("list.jsonl", b"[1]\n", [":1", "list"]),
        ("cut.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:2000], ["gzip"]),
        ("fake.txt.gz", b"hello", ["gzip"]),
        ("image.png", b"x", ["of a kind that is not read"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare([Source("s", [tmp_path / name])], tmp_path / "d", vocab_size=300, held_out=0.1)
    assert "\n" not in str(caught.value)
    for word in [name, *words] if name != "short.txt" else words:
        assert word in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_missing_files_and_existing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        prepare([Source("s", [tmp_path / "none.txt"])], tmp_path / "d")
    (tmp_path / "t.txt").write_text("words " * 100)
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="exists already"):
        prepare([Source("s", [tmp_path / "t.txt"])], tmp_path / "d", vocab_size=300)
    with pytest.raises(UserError, match="257"):
        prepare([Source("s", [tmp_path / "t.txt"])], tmp_path / "e", vocab_size=100)


def test_empty_documents_are_counted_and_skipped(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", ["one", "", "two", "", "three"])
    manifest = prepare(
        [Source("a", [tmp_path / "a.jsonl"])], tmp_path / "d", vocab_size=260, held_out=0.3
    )
    assert (manifest["sources"][0]["documents"], manifest["sources"][0]["documents_skipped"]) == (
        3,
        2,
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.txt").write_text("words " * 1000)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "extend", full)
    with pytest.raises(UserError, match="no space left while writing"):
        prepare([Source("s", [tmp_path / "t.txt"])], tmp_path / "d", vocab_size=300)
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


class TestDamage:
    """A data folder that changed after it was written."""

    @pytest.fixture
    def data(self, small_data: Path, tmp_path: Path) -> Path:
        shutil.copytree(small_data, tmp_path / "d")
        return tmp_path / "d"

    def shard(self, data: Path) -> Path:
        return data / "train/text-00000.npy"

    def test_truncated_and_padded_shards(self, data: Path) -> None:
        content = self.shard(data).read_bytes()
        for changed in (content[:-2], content + b"\0\0"):
            self.shard(data).write_bytes(changed)
            with pytest.raises(
                UserError,
                match=f"text-00000.npy: {len(changed)} bytes where {len(content)} were written",
            ):
                TokenFolder.open(data)

    def test_a_flipped_bit(self, data: Path) -> None:
        content = bytearray(self.shard(data).read_bytes())
        content[5000] ^= 4
        self.shard(data).write_bytes(content)
        with pytest.raises(UserError, match="checksum differs"):
            TokenFolder.open(data, verify=True)

    def test_a_missing_shard(self, data: Path) -> None:
        self.shard(data).unlink()
        with pytest.raises(UserError, match="missing"):
            TokenFolder.open(data)

    def test_a_header_that_lies(self, data: Path) -> None:
        content = self.shard(data).read_bytes()
        self.shard(data).write_bytes(content.replace(b"'<u2'", b"'<i2'"))
        with pytest.raises(UserError, match="not the array"):
            TokenFolder.open(data).tokens("train")

    @pytest.mark.parametrize("key", ["dtype", "fingerprint", "tokens", "file", "version", "splits"])
    def test_an_edited_manifest(self, data: Path, key: str) -> None:
        manifest = json.loads((data / "manifest.json").read_text())
        shard = manifest["splits"]["train"]["shards"][0]
        {
            "dtype": lambda: manifest.update(dtype="<u4"),
            "fingerprint": lambda: manifest.update(fingerprint="0" * 64),
            "tokens": lambda: shard.update(tokens=1 << 60),
            "file": lambda: shard.update(file="../../../etc/passwd"),
            "version": lambda: manifest.update(version=9),
            "splits": lambda: manifest.pop("splits"),
        }[key]()
        (data / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"manifest\.json"):
            TokenFolder.open(data)

    def test_another_tokenizer(self, data: Path) -> None:
        train_bpe(["other text"], 300).save(data / "tokenizer")
        with pytest.raises(UserError, match="not the tokenizer this data was made with"):
            TokenFolder.open(data).tokenizer()

    def test_the_fingerprint_is_of_content_not_of_place(self, data: Path, small_data: Path) -> None:
        assert (
            TokenFolder.open(data).fingerprint
            == TokenFolder.open(small_data).fingerprint
            == fingerprint(TokenFolder.open(data).manifest)
        )
