"""The fast tokenizer made from a SentencePiece model against SentencePiece itself."""

import contextlib
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.errors import UserError
from mobilellm.tokenizer.sentencepiece import splits_at_spaces
from mobilellm.tokenizer.sentencepiece_model import SPACE, read_model
from mobilellm.tokenizer.tokenizer import Tokenizer

spm = pytest.importorskip("sentencepiece")
MODELS = ("mistral-v1-32k", "llama2-32k")


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, shared: Path):
    path = shared / "tokenizer" / request.param / "tokenizer.model"
    return Tokenizer.load(path), spm.SentencePieceProcessor(str(path))


def agree(pair: tuple, text: str) -> None:
    ours, theirs = pair
    ids = theirs.encode(text)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        " a",
        "  a  b   ",
        "\n",
        "a\n\n b",
        "\t",
        "\0",
        "a\0b",
        "</s>",
        "a <s> b </s>",
        "<unk>",
        "<0x0A>",
        SPACE,
        f"a{SPACE}{SPACE} b",
        "😀 é e\u0301",
        "\ufeffx",
        "\ufffd",
        "日本語テキスト",
        "العربية",
        "0123456789" * 20,
        "a" * 500,
        " " * 300,
        "x = [i for i in range(10)]\n",
    ],
)
def test_awkward_texts(pair: tuple, text: str) -> None:
    agree(pair, text)


def test_a_sample_of_every_real_text(pair: tuple, shared: Path) -> None:
    rng = random.Random(0)
    for path in sorted((shared / "text").iterdir()):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            text = file.read(400_000)
        rows = text.splitlines()[:-1]
        texts = [json.loads(row)["text"] for row in rows] if ".jsonl" in path.name else rows
        for piece in texts if len(texts) < 150 else rng.sample(texts, 150):
            agree(pair, piece[:20_000])


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_arbitrary_unicode(pair: tuple, text: str) -> None:
    agree(pair, text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*" \n\t▁<>/sae0x", "</s>", "the", "é", "😀"]), max_size=40).map(
        "".join
    )
)
def test_arbitrary_runs_of_what_matters(pair: tuple, text: str) -> None:
    agree(pair, text)


def test_cutting_at_spaces_is_checked_against_the_pieces(shared: Path) -> None:
    model = read_model(shared / "tokenizer" / MODELS[0] / "tokenizer.model")
    assert splits_at_spaces(model)
    model.pieces[1000] = f"a{SPACE}b"
    assert not splits_at_spaces(model)


def test_survives_saving_and_transformers(pair: tuple, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = pair
    ours.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.sha256, again.bos_id, again.eos_id) == (ours.sha256, 1, 2)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("  Hello   world\n", "x  = 1", "naïve ☃"):
        assert auto(text, add_special_tokens=False).input_ids == theirs.encode(text)
        assert again.encode(text) == theirs.encode(text)
    assert (auto.bos_token_id, auto.eos_token_id) == (1, 2)


def test_damaged_models_are_refused(shared: Path, tmp_path: Path) -> None:
    content = (shared / "tokenizer" / MODELS[0] / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    rng = random.Random(1)
    cases = [
        b"",
        b"\0" * 1000,
        content[:1],
        content[: len(content) // 2],
        content[:-1],
        b"{}",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ]
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(UserError):
            Tokenizer.load(path)
    for _ in range(60):  # flipped bytes either still load, or are a user's error
        changed = bytearray(content)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            read_model(path)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("model_type", 3, "neither a BPE nor a Unigram"),
        ("charsmap", b"x", "normalization"),
        ("charsmap", b"\0\4\0\0" + b"\xff" * 1024, "normalization"),
    ],
)
def test_models_that_cannot_be_equalled_are_refused(
    shared: Path, field: str, value: object, word: str
) -> None:
    from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer

    model = read_model(shared / "tokenizer" / MODELS[0] / "tokenizer.model")
    setattr(model, field, value)
    with pytest.raises(UserError, match=word):
        to_fast_tokenizer(model)
