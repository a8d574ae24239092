"""What ends a document: the EOS that is named, and none that a text spells."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

from mobilellm import cli
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.prepare import task_run
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.tokenizer import encoder as encoding
from mobilellm.tokenizer.encoder import Encoder, UnbrokenTextError
from mobilellm.tokenizer.tokenizer import LONGEST_WORD, Tokenizer, train_bpe

TEXTS = [f"Text {i} spells </s> and <|im_end|> and goes on." for i in range(50)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer whose EOS is an added token that its file does not call special."""
    fast = train_bpe(TEXTS, 300).fast
    fast.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    fast.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    (tmp_path / "tokenizer").mkdir()
    fast.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return tmp_path


@pytest.mark.parametrize("library", ["tokenizers", "auto"])
def test_an_eos_that_a_text_spells_ends_nothing(folder: Path, library: str) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer")
    assert tokenizer.eos_id == tokenizer.fast.token_to_id("</s>")
    manifest = prepare(
        [Source("a", [folder / "a.jsonl"])],
        folder / "d",
        tokenizer=tokenizer,
        held_out=0.2,
        library=library,
    )
    data = TokenFolder.open(folder / "d", verify=True)
    found = []
    for split in ("train", "held_out"):
        tokens = data.tokens(split)
        ids = tokens.read(0, len(tokens)).tolist()
        assert ids.count(tokenizer.eos_id) == manifest["splits"][split]["documents"]
        found += data.tokenizer().decode(ids).split("</s>")
    assert len([part for part in found if part]) == 2 * len(TEXTS)  # each spells it once


def test_the_file_and_its_hash_stay_as_they_are(folder: Path) -> None:
    """The mark that keeps a spelled EOS text is ours; transformers sets it as well."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(folder / "tokenizer")
    own = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    tokenizer.save(folder / "again")
    assert json.loads((folder / "again/tokenizer.json").read_text()) == own
    assert tokenizer.replaced(chat_template="x").sha256 == tokenizer.sha256
    theirs = AutoTokenizer.from_pretrained(folder / "again")
    assert theirs.eos_token_id == tokenizer.eos_id
    assert "</s>" in theirs.all_special_tokens
    plain = Fast.from_file(str(folder / "tokenizer/tokenizer.json"))
    assert plain.encode("a </s> b").ids == tokenizer.encode("a </s> b", parse_special=True)


def test_an_eos_can_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", str(folder / "a.jsonl"), "--held-out", "0.2", "--out"]
    given = ["--tokenizer", str(folder / "tokenizer"), "--eos"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, str(folder / "d"), *given, "<|im_end|>"])
    assert not caught.value.code
    data = TokenFolder.open(folder / "d")
    assert data.tokenizer().token(data.eos_id) == "<|im_end|>"
    assert data.tokens("train").read(0, 10_000)[-1] == data.eos_id
    assert Tokenizer.load(folder / "d/tokenizer").eos_id == data.eos_id
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, str(folder / "e"), "--vocab-size", "300", "--eos", "<end>"])
    assert not caught.value.code
    assert TokenFolder.open(folder / "e").tokenizer().token(0) == "<end>"
    for more, words in (
        ([*given, "<nothing>"], "no token '<nothing>' to end documents with"),
        ([*given, "</s>", "--no-eos"], "--eos and --no-eos are both given"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments, str(folder / "f"), *more])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, str(folder / "g"), *given[:2], "--no-eos"])
    assert not json.loads((folder / "g/manifest.json").read_text())["eos"]


def test_training_on_a_text_without_spaces_takes_its_length_not_its_square() -> None:
    """300 kB of random letters took 18 seconds."""
    import random

    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=300_000)
    start = time.process_time()
    tokenizer = train_bpe(["".join(letters)], 4096)
    assert time.process_time() - start < 6
    assert tokenizer.vocab_size == 4096
    plain = train_bpe(["ab " * 1000 + "y" * LONGEST_WORD], 270)
    assert plain.sha256 == train_bpe(["ab " * 1000 + "y" * LONGEST_WORD], 270).sha256


@pytest.mark.parametrize("text", ["x" * 1000, " " * 1000, "漢" * 600 + "12" * 400 + " end"])
def test_words_are_cut_and_no_character_is_lost(text: str) -> None:
    from tokenizers import pre_tokenizers

    from mobilellm.tokenizer.tokenizer import _without_long_words

    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = list(_without_long_words(["short text", text]))
    assert parts[0] == "short text"
    assert "".join(parts[1:]) == text
    words = [end - start for part in parts for _, (start, end) in pre.pre_tokenize_str(part)]
    assert max(words) <= LONGEST_WORD


def test_a_text_without_a_place_to_cut_is_named_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE", 2000)
    monkeypatch.setattr(encoding, "REACH", 200)
    monkeypatch.setattr(encoding, "MAX_UNBROKEN", 9000)
    monkeypatch.setattr(task_run, "LONG", 2000)
    tokenizer = train_bpe(["some words"], 300)
    with pytest.raises(UnbrokenTextError, match="characters without a place to cut"):
        list(Encoder(tokenizer, "tokenizers").long(["x" * 1000] * 12))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("good words " * 300 + "x" * 20_000)
    for i in range(20):
        (tmp_path / f"in/b{i:02d}.txt").write_text("good words " * (300 if i % 5 else 3))
    sources = [Source("s", [tmp_path / "in"])]
    with pytest.raises(UserError, match=r"a\.txt: .* without a place to cut") as caught:
        prepare(sources, tmp_path / "d", tokenizer=tokenizer, held_out=0.2)
    assert "\n" not in str(caught.value)
    manifest = prepare(sources, tmp_path / "d", tokenizer=tokenizer, held_out=0.2, on_bad="skip")
    (source,) = manifest["sources"]
    assert (source["records"], source["documents"], source["bad"]) == (21, 20, 1)
    data = TokenFolder.open(tmp_path / "d", verify=True)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 20
    for split in ("train", "held_out"):
        tokens = data.tokens(split)
        assert "xx" not in data.tokenizer().decode(tokens.read(0, len(tokens)).tolist())


def test_spaces_that_are_rare_are_places_to_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from where one is looked for first."""
    monkeypatch.setattr(encoding, "PIECE", 2000)
    monkeypatch.setattr(encoding, "REACH", 200)
    monkeypatch.setattr(encoding, "MAX_UNBROKEN", 9000)
    tokenizer = train_bpe(["some words"], 300)
    text = " ".join("abc" * 900 for _ in range(20))
    found = [ids.tolist() for ids in Encoder(tokenizer, "tokenizers").long([text])]
    assert len(found) > 3
    assert [i for ids in found for i in ids] == tokenizer.encode(text)
