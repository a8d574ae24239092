"""The original's layout out and in, samples of token ids, Parquet and zstd, named sources, and
--validate."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mobilellm.cli import main
from mobilellm.data.dataset import open_dataset
from mobilellm.data.loader import DataState, Loader
from mobilellm.data.token_folder import TokenFolder
from mobilellm.data.validate import validate
from mobilellm.errors import UserError
from mobilellm.prepare import samples as module
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source, parse_sources
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe


@pytest.fixture
def corpus(tmp_path: Path, sample_text: str) -> Path:
    for name, base in (("a", 0), ("b", 200_000)):
        texts = [sample_text[i : i + 500] for i in range(base, base + 100_000, 500)]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
    train_bpe([sample_text[:100_000]], 500).save(tmp_path / "tokenizer")
    return tmp_path


def sources(corpus: Path) -> list[Source]:
    return [Source(name, [corpus / f"{name}.jsonl"], given=True) for name in "ab"]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("nodes", [1, 3, 7])
def test_every_sample_is_in_exactly_one_place(
    corpus: Path, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_SAMPLES", 20)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    options = {"tokenizer": tokenizer, "held_out": 0.1, "sequence_length": 128}
    manifest = prepare(sources(corpus), corpus / "out", nodes=nodes, **options)
    prepare(sources(corpus), corpus / "shards", **options)
    folder = TokenFolder.open(corpus / "shards")
    expected = []
    for name in "ab":
        stream = folder.tokens("train", name)
        whole = len(stream) // 129
        expected += [(name, *stream.read(i * 129, 129).tolist()) for i in range(whole)]
        assert manifest["splits"]["train"]["tokens_left_out"][name] == len(stream) - whole * 129
    per_node = [
        [r for f in sorted((corpus / f"out/{n}").glob("*.jsonl")) for r in rows(f)]
        for n in range(1, nodes + 1)
    ]
    found = [(row["source"], *row["token_ids"]) for node in per_node for row in node]
    assert sorted(found) == sorted(expected)
    assert found != expected
    assert max(map(len, per_node)) - min(map(len, per_node)) <= 1
    assert {row["source"] for row in per_node[0]} == {"a", "b"}
    assert (
        sum(len(rows(f)) for f in (corpus / "out/held_out").glob("*.jsonl"))
        == manifest["splits"]["held_out"]["samples"]
        > 0
    )
    report = validate(corpus / "out")
    assert (report.faults, report.faults_in_all) == ([], 0)
    assert report.nodes == [len(node) for node in per_node]
    other = prepare(sources(corpus), corpus / "other", nodes=nodes, seed=1, **options)
    assert [f["sha256"] for f in other["files"]] != [f["sha256"] for f in manifest["files"]]
    data = open_dataset(corpus / "out")
    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)
    batch, _ = next(iter(Loader(data.tokens("train"), 128, 4, state, mask_documents=True)))
    assert batch.inputs.shape == (4, 128)
    assert not list(corpus.glob("*.preparing"))


def test_more_nodes_than_samples(corpus: Path) -> None:
    with pytest.raises(UserError, match="too few for 5000 nodes"):
        prepare(
            sources(corpus),
            corpus / "out",
            tokenizer=Tokenizer.load(corpus / "tokenizer"),
            nodes=5000,
            sequence_length=128,
        )


def test_samples_of_token_ids_are_read(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    prepare(
        sources(corpus),
        corpus / "samples",
        tokenizer=tokenizer,
        nodes=2,
        sequence_length=128,
        held_out=0.1,
    )
    manifest = prepare(
        [Source("x", [corpus / "samples/1"])],
        corpus / "d",
        tokenizer=tokenizer,
        sequence_length=128,
        held_out=0.1,
    )
    assert [s["name"] for s in manifest["sources"]] == ["a", "b"]
    given = prepare(
        [Source("x", [corpus / "samples/1"], given=True)],
        corpus / "e",
        tokenizer=tokenizer,
        sequence_length=128,
        held_out=0.1,
    )
    assert [s["name"] for s in given["sources"]] == ["x"]
    lines = [row["token_ids"] for row in rows(corpus / "samples/1/00000.jsonl")]
    folder = TokenFolder.open(corpus / "e", verify=True)
    assert sum(len(folder.tokens(split)) for split in ("train", "held_out")) == 129 * len(lines)
    stream = folder.tokens("train")
    ends = set(stream.ends().tolist())
    assert {
        i + 1 for i in np.flatnonzero(stream.read(0, len(stream)) == folder.eos_id).tolist()
    } <= ends
    with pytest.raises(UserError, match=r"00000\.jsonl:1: 129 ids, a sample has 2048 or 2049"):
        prepare([Source("x", [corpus / "samples/1"])], corpus / "f", tokenizer=tokenizer)
    with pytest.raises(UserError, match="token ids, and no tokenizer named"):
        prepare([Source("x", [corpus / "samples/1"])], corpus / "f", vocab_size=300)


def test_the_real_bad_sample(shared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer/llama2-32k")
    bad = Source("c4", [shared / "amber/bad_sample.jsonl"])
    with pytest.raises(UserError, match=r"bad_sample\.jsonl:4: broken JSON"):
        prepare([bad], tmp_path / "d", tokenizer=tokenizer)
    manifest = prepare([bad], tmp_path / "d", tokenizer=tokenizer, on_bad="skip", held_out=0.2)
    assert [Path(where).name for where, _ in manifest["skipped"]["first"]] == [
        f"bad_sample.jsonl:{n}" for n in (4, 9, 10)
    ]
    assert "2050 ids" in manifest["skipped"]["first"][1][1]
    (source,) = manifest["sources"]
    assert (source["records"], source["documents"], source["bad"]) == (10, 7, 3)
    report = validate(shared / "amber/bad_sample.jsonl")
    assert [where for where, _ in report.faults] == [
        "bad_sample.jsonl:4",
        "bad_sample.jsonl:9",
        "bad_sample.jsonl:10",
    ]
    assert validate(shared / "amber/good_sample.jsonl", tokenizer=tokenizer).faults == []
    assert validate(shared / "amber/good_sample.jsonl", sequence_length=1024).faults_in_all == 9


def damage_ids(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[128 + 2 * 700 : 130 + 2 * 700] = b"\xff\xff"
    path.write_bytes(content)
    return "token 700: id 65535, must be below 500"


def test_faults_of_a_token_folder_are_all_named(corpus: Path) -> None:
    prepare(
        sources(corpus), corpus / "d", tokenizer=Tokenizer.load(corpus / "tokenizer"), held_out=0.1
    )
    folder = corpus / "d"
    assert validate(folder).faults == []
    expected = damage_ids(folder / "train/a-00000.npy")
    (folder / "train/b-00000.ends.npy").unlink()
    (folder / "held_out/stray.npy").write_bytes(b"x")
    content = (folder / "held_out/a-00000.npy").read_bytes()
    (folder / "held_out/a-00000.npy").write_bytes(content[:-6])
    for workers in (1, 2):
        faults = dict(validate(folder, workers=workers).faults)
        assert "checksum differs" in faults["train/a-00000.npy"]
        assert faults["train/a-00000.npy " + expected.split(":")[0]] == expected.split(": ")[1]
        assert (
            "missing" in faults["train/b-00000.npy (b-00000.ends.npy)"]
            or "cannot be read" in faults["train/b-00000.npy (b-00000.ends.npy)"]
        )
        assert "bytes where" in faults["held_out/a-00000.npy"]
        assert faults["held_out/stray.npy"] == "not in the manifest"


def test_faults_of_the_layout_are_all_named(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(
        sources(corpus),
        corpus / "d",
        tokenizer=Tokenizer.load(corpus / "tokenizer"),
        nodes=3,
        sequence_length=128,
    )
    (corpus / "d/manifest.json").unlink()
    with open(corpus / "d/2/00000.jsonl", "a") as file:
        file.write(
            "{\n"
            + json.dumps({"token_ids": [1] * 128 + [500]})
            + "\n\n"
            + json.dumps({"token_ids": [1] * 12})
            + "\n"
        )
    shutil.rmtree(corpus / "d/1")
    count = len(rows(corpus / "d/3/00000.jsonl"))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--validate", str(corpus / "d"), "--sequence-length", "128", "--json"])
    assert ended.value.code == 2
    report = json.loads(capsys.readouterr().out)
    faults = dict(report["faults"])
    assert "no such node's folder" in faults["1/"]
    text = (corpus / "d/2/00000.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(text, 1) if line == "{")
    assert first in (count + 1, count + 2)
    assert "broken JSON" in faults[f"2/00000.jsonl:{first}"]
    assert "id 500 at place 128" in faults[f"2/00000.jsonl:{first + 1}"]
    assert faults[f"2/00000.jsonl:{first + 3}"] == "12 ids, must be 128 or 129"
    assert report["faults_in_all"] == 4
    with pytest.raises(UserError, match="neither a token folder"):
        validate(corpus / "tokenizer")


class TestKinds:
    """Every kind of file gives the same documents."""

    def test_all_kinds(self, corpus: Path) -> None:
        zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        content = (corpus / "a.jsonl").read_bytes()
        (corpus / "g.jsonl.gz").write_bytes(
            gzip.compress(content[:30_000]) + gzip.compress(content[30_000:]) + b"\0" * 100
        )
        pack = zstandard.ZstdCompressor().compress
        (corpus / "z.jsonl.zst").write_bytes(pack(content[:30_000]) + pack(content[30_000:]))
        texts = [row["text"] for row in rows(corpus / "a.jsonl")]
        parquet.write_table(
            pyarrow.table({"n": range(len(texts)), "text": texts}),
            corpus / "p.parquet",
            row_group_size=33,
        )
        prints = set()
        for name in ("a.jsonl", "g.jsonl.gz", "z.jsonl.zst", "p.parquet"):
            tokenizer = Tokenizer.load(corpus / "tokenizer")
            manifest = prepare(
                [Source("s", [corpus / name])], corpus / name.replace(".", "-"), tokenizer=tokenizer
            )
            folder = TokenFolder.open(corpus / name.replace(".", "-"))
            everything = np.concatenate(
                [folder.tokens(s).read(0, 1 << 40) for s in ("train", "held_out")]
            )
            prints.add(
                (
                    manifest["sources"][0]["documents"],
                    len(everything),
                    int(np.bincount(everything) @ np.arange(1, 1 + everything.max() + 1)),
                )
            )
        assert len(prints) == 1

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.parquet", b"PAR1 no", "not a sound Parquet file"),
            ("a.jsonl.zst", b"hello", "zstd"),
            ("a.jsonl.gz", b"hello", "gzip"),
            ("a.txt.gz", b"", "gzip"),
        ],
    )
    def test_damaged_archives(self, tmp_path: Path, name: str, content: bytes, words: str) -> None:
        pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            prepare([Source("s", [tmp_path / name])], tmp_path / "d", vocab_size=300)

    @pytest.mark.parametrize(
        ("name", "package"),
        [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard"), ("a.md.zst", "zstandard")],
    )
    @pytest.mark.parametrize("on_bad", ["stop", "skip"])
    def test_packages_that_are_not_there_are_named_and_nothing_is_skipped(
        self, tmp_path: Path, name: str, package: str, on_bad: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / "b.jsonl").write_text('{"text": "some words"}\n' * 9)
        sources = [Source("s", [tmp_path / "b.jsonl", tmp_path / name])]
        with pytest.raises(
            UserError, match=rf"needs the package {package}; pip install 'mobilellm\[data\]'"
        ):
            prepare(sources, tmp_path / "d", vocab_size=300, on_bad=on_bad)

    def test_columns_that_are_not_there(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"body": ["x"], "text": [5]}), tmp_path / "p.parquet")
        with pytest.raises(UserError, match=r"p\.parquet: column 'text' is int64, not text"):
            prepare([Source("s", [tmp_path / "p.parquet"])], tmp_path / "d", vocab_size=300)
        with pytest.raises(UserError, match=r"no column 'words' \(found body, text\)"):
            prepare(
                [Source("s", [tmp_path / "p.parquet"])],
                tmp_path / "d",
                vocab_size=300,
                text_field="words",
            )


class TestNaming:
    def test_options_patterns_and_lists(self, corpus: Path) -> None:
        for name in ("x1.md", "x2.md"):
            (corpus / name).write_text("words")
        (corpus / "list.toml").write_text('[[source]]\nname = "l"\npaths = "x*.md"\nweight = 2\n')
        found = parse_sources([], [f"w:0.5={corpus}/x*.md"], corpus / "list.toml")
        assert [(s.name, s.weight, [p.name for p in s.paths]) for s in found] == [
            ("w", 0.5, ["x1.md", "x2.md"]), ("l", 2.0, ["x1.md", "x2.md"]),
        ]  # fmt: skip
        assert [s.name for s in parse_sources([f"{corpus}/x*.md"])] == ["x_"]

    @pytest.mark.parametrize(
        ("named", "words"),
        [
            (["nothing"], "must be NAME=PATH"),
            (["a:zero=x"], "the weight is 'zero'"),
            (["a:-1=x"], "must be a number above 0"),
            (["a:1=x", "b=y"], "'a' has a weight and 'b' has none"),
            (["a=none*.txt"], "no file fits"),
        ],
    )
    def test_faults(self, tmp_path: Path, named: list[str], words: str) -> None:
        with pytest.raises(UserError, match=words):
            parse_sources([], named)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("source = 5", "must hold a list"),
            ("[[source]]\nname = 'a'\npath = 'x'", "unknown key 'path'; did you mean 'paths'"),
            ("[[source]]\nname = 'a/b'\npaths = ['x']", "its name is"),
            ("[[source]]\nname = 'a'\npaths = []", "its paths are"),
            ("[[source", "not TOML"),
        ],
    )
    def test_lists_that_make_no_sense(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "s.toml").write_text(text)
        with pytest.raises(UserError, match=words):
            parse_sources([], [], tmp_path / "s.toml")


def test_the_verb_says_what_went_in_and_out(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(corpus / "a.jsonl", "a") as file:
        file.write('{"text": ""}\n{broken\n')
    arguments = [
        "prepare",
        "--source",
        f"a={corpus}/a.jsonl",
        "--out",
        str(corpus / "d"),
        "--tokenizer",
        str(corpus / "tokenizer"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "a.jsonl:202: broken JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--on-bad", "skip"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "documents: 202 in = 200 out + 2 skipped (1 empty, 1 bad)" in shown
    assert "a.jsonl:202: broken JSON" in shown
