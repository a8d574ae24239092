"""data-stats: its figures against the tokens themselves, its page, and hostile text in it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mobilellm.cli import main
from mobilellm.data.byte_lengths import byte_lengths
from mobilellm.data.dataset import open_dataset
from mobilellm.data.stats import statistics
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe


@pytest.fixture
def data(tmp_path: Path, sample_text: str) -> Path:
    for name, size in (("a", 300), ("b", 1100)):
        texts = [sample_text[i : i + size + i % 97] for i in range(0, 120_000, size)]
        texts[3] = "<script>alert(1)</script> & <|endoftext|> " * 20
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
    prepare(
        [Source(n, [tmp_path / f"{n}.jsonl"], weight) for n, weight in (("a", 0.25), ("b", 0.75))],
        tmp_path / "d",
        vocab_size=500,
    )
    return tmp_path / "d"


def test_the_figures_are_those_of_the_tokens(data: Path) -> None:
    folder = open_dataset(data)
    figures = statistics(folder, top=500)
    stream = folder.tokens("train")
    tokens = stream.read(0, len(stream)).astype(int)
    assert figures["splits"]["train"]["tokens"] == len(tokens)
    for split in ("train", "held_out"):
        assert figures["splits"][split]["bytes"] == folder.text_bytes(split)
    assert {row["id"]: row["count"] for row in figures["frequent"]} == dict(
        zip(*np.unique(tokens, return_counts=True), strict=True)
    )
    lengths = np.diff(stream.ends(), prepend=0)
    assert figures["length"] == {
        "least": lengths.min(),
        "mean": pytest.approx(lengths.mean()),
        "most": lengths.max(),
    }
    assert (
        sum(row["documents"] for row in figures["lengths"])
        == len(lengths)
        == figures["splits"]["train"]["documents"]
    )
    for row in figures["lengths"]:
        assert row["documents"] == ((lengths >= row["from"]) & (lengths < row["below"])).sum()
    assert [(s["name"], s["weight"], s["tokens"]) for s in figures["sources"]] == [
        (n, w, len(folder.tokens("train", n))) for n, w in (("a", 0.25), ("b", 0.75))
    ]
    assert folder.weights() == {"a": 0.25, "b": 0.75}
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert figures["vocabulary"]["entropy_bits"] == pytest.approx(-(p * np.log2(p)).sum())
    whole = {
        folder.tokenizer().decode(tokens[b:e].tolist(), skip_special_tokens=True)
        for b, e in zip(stream.ends() - lengths, stream.ends(), strict=True)
    }
    assert len(figures["samples"]) == 10
    assert all(sample["cut"] or sample["text"] in whole for sample in figures["samples"])


def test_the_page_and_the_verb(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data-stats", str(data), "--html", str(tmp_path / "page.html"), "--seed", "4"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "bytes a token" in shown
    assert "weight 0.75" in shown
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<tr") > 50
    assert len(re.findall(r'<figure class="sample">', page)) == 10
    with pytest.raises(SystemExit):
        main(["data-stats", str(data), "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "shards"


def test_samples_have_the_same_figures(data: Path, tmp_path: Path, sample_text: str) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer")
    (tmp_path / "t.txt").write_text(sample_text[:100_000])
    prepare(
        [Source("t", [tmp_path / "t.txt"], given=True)],
        tmp_path / "s",
        tokenizer=tokenizer,
        nodes=2,
        sequence_length=64,
    )
    figures = statistics(open_dataset(tmp_path / "s"))
    assert figures["kind"] == "samples"
    assert figures["splits"]["train"]["tokens"] % 65 == 0
    assert figures["sources"][0]["name"] == "t"


@pytest.mark.parametrize("which", ["bpe", "mistral-v1-32k"])
def test_bytes_of_tokens(shared: Path, sample_text: str, which: str) -> None:
    text = sample_text[:5000] + " naïve 日本語 😀\t x"
    tokenizer = (
        train_bpe([text], 600) if which == "bpe" else Tokenizer.load(shared / "tokenizer" / which)
    )
    size = int(byte_lengths(tokenizer)[tokenizer.encode(text)].sum())
    assert size - len(text.encode()) == (
        0 if which == "bpe" else 1
    )  # SentencePiece puts a space before each text
