"""The original's layout of JSON lines, read for training: indexed once, rows kept, faults named."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mobilellm.data import dataset as module
from mobilellm.data.dataset import SampleFolder, open_dataset
from mobilellm.data.loader import DataState
from mobilellm.data.mixture import Mixture, Stage
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

ROW = 65


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:20_000]], 300)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three nodes, nine files, 270 rows; row i is of source a, b or none, and holds an EOS at
    place 20 and at its end."""
    rng = np.random.default_rng(0)
    number = 0
    for node in (1, 2, 10):
        (tmp_path / f"base/{node}").mkdir(parents=True)
        for name in "xyz":
            with open(tmp_path / f"base/{node}/{name}.jsonl", "w") as file:
                for _ in range(30):
                    ids = rng.integers(1, 300, ROW)
                    ids[20] = ids[ROW - 1] = 0
                    ids[0] = 1 + number
                    row = {"token_ids": ids.tolist()} | (
                        {"source": "ab"[number % 3]} if number % 3 < 2 else {}
                    )
                    file.write(json.dumps(row) + "\n")
                    number += 1
    return tmp_path / "base"


def firsts(data: SampleFolder) -> dict[str, list[int]]:
    return {
        split: [int(stream.read(i, 1)[0]) - 1 for i in range(0, len(stream), ROW)]
        for split in ("train", "held_out")
        if (stream := data.tokens(split)) is not None
    }


def test_every_row_is_in_one_split_and_stays_whole(base: Path, tokenizer: Tokenizer) -> None:
    data = open_dataset(base, tokenizer)
    assert isinstance(data, SampleFolder)
    assert (data.row, data.sources(), data.vocab_size, data.eos_id) == (
        ROW,
        ["a", "all", "b"],
        300,
        0,
    )
    found = firsts(data)
    assert sorted(found["train"] + found["held_out"]) == list(range(270))
    assert 1 <= len(found["held_out"]) <= 10
    lengths = {
        name: sum(len(data.tokens(split, name)) for split in ("train", "held_out"))
        for name in data.sources()
    }
    assert lengths == dict.fromkeys(["a", "all", "b"], 90 * ROW)
    texts = [(base / f"{n}/{f}.jsonl").read_text() for n in (1, 2, 10) for f in "xyz"]
    raw = [json.loads(line)["token_ids"] for text in texts for line in text.splitlines()]
    stream = data.tokens("train", "b")
    for start in range(0, len(stream), ROW):
        ids = stream.read(start, ROW).tolist()
        assert ids == raw[ids[0] - 1]
    assert data.text_bytes("held_out") > 0


def test_documents_end_at_each_eos(base: Path, tokenizer: Tokenizer) -> None:
    data = open_dataset(base, tokenizer)
    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)
    streams = {name: data.tokens("train", name) for name in data.sources()}
    mixture = Mixture(
        streams,
        [Stage(until_tokens=None, weights={"a": 1, "b": 1})],
        ROW - 1,
        4,
        state,
        mask_documents=True,
    )
    batch, _ = next(iter(mixture))
    assert batch.documents is not None
    for tokens, numbers in zip(batch.inputs, batch.documents, strict=True):
        expected = np.concatenate(([0], np.cumsum(tokens[:-1] == 0)))
        assert np.array_equal(numbers, expected)


def test_the_json_is_read_once(
    base: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_dataset(base, tokenizer)

    def refuse(*_: object) -> None:
        raise AssertionError("the JSON lines were read again")

    monkeypatch.setattr(module, "parse_sample", refuse)
    again = open_dataset(base, tokenizer, verify=True)
    assert again.fingerprint == first.fingerprint
    with open(base / "2/y.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(AssertionError):
        open_dataset(base, tokenizer)


def test_many_processes_read_the_json(
    base: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_dataset(base, tokenizer)
    found = firsts(one)
    shutil.rmtree(base / module.CACHE)
    monkeypatch.setattr(module, "PARALLEL_BYTES", 0)
    many = open_dataset(base, tokenizer, verify=True)
    assert many.fingerprint == one.fingerprint
    assert firsts(many) == found
    assert not list(base.glob("*.preparing"))


def test_some_sample_is_held_out_of_few(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/a.jsonl").write_text("")
    (tmp_path / "1/b.jsonl").write_text(
        "".join(json.dumps({"token_ids": [i + 1] * 9}) + "\n" for i in range(4))
    )
    data = open_dataset(tmp_path, tokenizer)
    assert (len(data.tokens("train")), len(data.tokens("held_out"))) == (27, 9)
    (tmp_path / "1/b.jsonl").write_text(json.dumps({"token_ids": [1] * 9}) + "\n")
    with pytest.raises(UserError, match="a single sample is too little"):
        open_dataset(tmp_path, tokenizer)


def test_changes_are_seen(base: Path, tokenizer: Tokenizer) -> None:
    first = open_dataset(base, tokenizer).fingerprint
    (base / "2/y.jsonl").unlink()
    data = open_dataset(base, tokenizer)
    assert data.fingerprint != first
    assert sum(len(rows) for rows in firsts(data).values()) == 240
    damaged = next((base / module.CACHE / "train").glob("*[0-9].npy"))
    content = bytearray(damaged.read_bytes())
    content[500] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="checksum differs"):
        open_dataset(base, tokenizer, verify=True)
    damaged.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is damaged; remove .*mobilellm-index"):
        open_dataset(base, tokenizer)


def test_a_folder_of_its_own_is_held_out(base: Path, tokenizer: Tokenizer) -> None:
    shutil.move(base / "10", base / "held_out")
    found = firsts(open_dataset(base, tokenizer))
    assert (sorted(found["train"]), sorted(found["held_out"])) == (
        list(range(180)),
        list(range(180, 270)),
    )


def test_a_folder_that_may_not_be_written_to(
    base: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(base))
    assert sum(map(len, firsts(open_dataset(base, tokenizer)).values())) == 270
    assert not (base / module.CACHE).exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "broken JSON"),
        ('{"tokens": [1]}', "no field 'token_ids' .found tokens."),
        ('{"token_ids": [1, 2.5]}', "not a whole number"),
        ('{"token_ids": [1, [2]]}', "not a whole number"),
        ('{"token_ids": []}', "empty"),
        (
            json.dumps({"token_ids": [1] * (ROW - 1) + [300]}),
            "id 300 at place 64, must be from 0 to 299",
        ),
        (json.dumps({"token_ids": [-1] + [1] * (ROW - 1)}), "id -1 at place 0"),
        (json.dumps({"token_ids": [1] * (ROW + 1)}), "66 ids, where the first sample has 65"),
        (json.dumps({"token_ids": [1] * ROW, "source": 5}), "source is 5"),
    ],
)
def test_bad_lines_are_named(base: Path, tokenizer: Tokenizer, line: str, words: str) -> None:
    with open(base / "2/y.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"2/y\.jsonl:31: .*{words}"):
        open_dataset(base, tokenizer)
    assert not (base / module.CACHE).exists()


def test_the_real_sample(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    shutil.copy(shared / "amber/good_sample.jsonl", tmp_path / "1/a.jsonl")
    data = open_dataset(tmp_path, shared / "tokenizer/llama2-32k")
    assert isinstance(data, SampleFolder)
    assert (data.row, data.sources()) == (2049, ["c4"])
    assert len(data.tokens("train")) + len(data.tokens("held_out")) == 9 * 2049
    shutil.copy(shared / "amber/bad_sample.jsonl", tmp_path / "1/b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl:4: broken JSON"):
        open_dataset(tmp_path, shared / "tokenizer/llama2-32k")


def test_a_token_folder_opens_the_same_way(
    small_data: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = open_dataset(small_data)
    assert isinstance(data, TokenFolder)
    assert data.sources() == ["text"]
    assert open_dataset(small_data, small_data / "tokenizer").fingerprint == data.fingerprint
    with pytest.raises(UserError, match="made with another tokenizer"):
        open_dataset(small_data, tokenizer)
    with pytest.raises(UserError, match="no such data folder"):
        open_dataset(tmp_path / "none")


def test_samples_need_a_tokenizer(base: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="samples without a tokenizer"):
        open_dataset(base)
    tokenizer.save(base / "tokenizer")
    assert open_dataset(base).vocab_size == 300


def test_more_sources_than_files_may_be_open(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source has a file of its own; the one that was used longest ago is closed for a new."""
    (tmp_path / "base/1").mkdir(parents=True)
    lines = (
        json.dumps({"token_ids": [i, i + 1, 5, 0], "source": f"s{i * 7 % 50}"}) + "\n"
        for i in range(1, 251)
    )
    (tmp_path / "base/1/a.jsonl").write_text("".join(lines))
    shutil.copytree(tmp_path / "base", tmp_path / "few")
    usual = open_dataset(tmp_path / "base", tokenizer)
    monkeypatch.setattr(module, "MAX_OPEN", 3)
    few = open_dataset(tmp_path / "few", tokenizer, verify=True)
    assert few.sources() == usual.sources()
    assert len(few.sources()) == 50
    for source in few.sources():
        mine, theirs = (data.tokens("train", source) for data in (few, usual))
        assert mine.read(0, len(mine)).tolist() == theirs.read(0, len(theirs)).tolist()
    assert few.fingerprint == usual.fingerprint
