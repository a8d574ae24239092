"""Kinds of SentencePiece models, trained here: each gives SentencePiece's own ids on any text,
or is refused."""

import random
import struct
from pathlib import Path

import pytest
from tests.sentencepiece_files import sentencepiece_file

from mobilellm.errors import UserError
from mobilellm.tokenizer import sentencepiece as own
from mobilellm.tokenizer import sentencepiece_model as files
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.workflows.token_probe import TEXTS

spm = pytest.importorskip("sentencepiece")
ALPHABET = [
    *"the ano  \n\t▁é😀<>/s\0x",
    "</s>",
    "<unk>",
    "<s>",
    "the ",
    "--",
    "<0x0A>",
    "<sep>",
    "<ctl>",
    "ing",
    "s>",
    "  ",
]


def train(sample_text: str, **settings: object) -> bytes:
    """The model file of a BPE of 600 pieces with byte fallback, or as `settings` say."""
    return sentencepiece_file(sample_text[:150_000], **settings)


def load(content: bytes, folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(content)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"split_by_whitespace": False},
        {"pad_id": 3},
        {"unk_id": 5, "bos_id": 1, "eos_id": 0},
        {"control_symbols": ["<ctl>", "<sep>"]},
        {
            "add_dummy_prefix": False,
            "user_defined_symbols": ["<sep>", "ing", "<sep>x", "\n\n", "▁▁"],
        },
        {
            "add_dummy_prefix": False,
            "user_defined_symbols": ["s>", "<se", "▁▁▁"],
            "control_symbols": ["<sep>"],
        },
    ],
    ids=str,
)
def test_ids_are_sentencepieces_own(settings: dict, sample_text: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    content = train(sample_text, **settings)
    ours, theirs = load(content, tmp_path), spm.SentencePieceProcessor(model_proto=content)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    ours.save(tmp_path / "saved")
    again, auto = (
        Tokenizer.load(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    assert again.sha256 == ours.sha256
    assert auto.unk_token_id == theirs.unk_id()
    rng = random.Random(0)
    for _ in range(1500):
        text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(40)))
        ids = theirs.encode(text)
        assert ours.encode(text) == again.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
    plain = " \nof user-defined <sep>x pieces,\n\n   coming and going"
    if not settings.get(
        "control_symbols"
    ):  # those transformers would read as the tokens they spell
        assert auto(plain, add_special_tokens=False).input_ids == theirs.encode(plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"user_defined_symbols": ["<sep>"]}, "user-defined pieces together with a space before"),
        (
            {"add_dummy_prefix": False, "user_defined_symbols": ["a b"]},
            "a user-defined piece with a plain space",
        ),
        ({"control_symbols": ["a"]}, "a control piece of one character"),
        ({"treat_whitespace_as_suffix": True}, "spaces after words"),
        ({"model_type": "word", "byte_fallback": False}, "neither a BPE nor a Unigram model"),
        (
            {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
            "user-defined pieces in a Unigram model",
        ),
        (
            {"normalization_rule_name": "nfkc", "user_defined_symbols": ["<sep>"]},
            "user-defined pieces in a Unigram model, or beside a normalization",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_equalled_is_refused(
    settings: dict, words: str, sample_text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"tokenizer\.model: {words}"):
        load(train(sample_text, **settings), tmp_path)


MORE = [
    *ALPHABET,
    *"ABＡﬁ½Ⅷ²…\u00a0\u200b\u3000éñ日本ё",
    "e\u0301",
    "\r\n",
    "\r",
    "👩‍👩‍👧",
    "  ",
    "   ",
]
DEFAULTS = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS | {"model_type": "unigram", "byte_fallback": False},
        DEFAULTS | {"model_type": "unigram"},
        DEFAULTS,
        DEFAULTS | {"byte_fallback": False},
        {"model_type": "unigram", "split_by_whitespace": False},
        {"model_type": "unigram", "control_symbols": ["<ctl>", "<sep>"], "unk_id": 3, "pad_id": 0},
        {"model_type": "unigram", "add_dummy_prefix": False, "remove_extra_whitespaces": True},
        # The recipe of llama2.c's own vocabularies.
        {"remove_extra_whitespaces": True, "split_digits": True, "character_coverage": 1.0},
        {"normalization_rule_name": "nfkc_cf", "byte_fallback": False},
    ],
    ids=str,
)
def test_sentencepieces_own_defaults_are_read_exactly(
    settings: dict, sample_text: str, tmp_path: Path
) -> None:
    content = train(sample_text[:50_000], **settings)
    ours, theirs = load(content, tmp_path), spm.SentencePieceProcessor(model_proto=content)
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    rng = random.Random(0)
    texts = ["".join(rng.choice(MORE) for _ in range(rng.randrange(40))) for _ in range(500)]
    for text in [*TEXTS, *texts, "", " ", "▁▁", "\n", "<unk>", "a <s> b<ctl>"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == again.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)


def test_control_pieces_of_unknown_characters_are_unknown(tmp_path: Path) -> None:
    text = "алфавит и слова\n" * 200 + "ещё немного слов для букв"
    content = train(text, vocab_size=23, model_type="unigram", byte_fallback=False)
    ours, theirs = load(content, tmp_path), spm.SentencePieceProcessor(model_proto=content)
    for text in ("<s>", "слова<s>и</s> <unk>", "a<s>b", "x"):
        assert ours.encode(text) == theirs.encode(text), text


def test_a_model_without_a_character(tmp_path: Path) -> None:
    """Nothing but an unknown piece and control pieces: SentencePiece refuses it, too."""
    unigram = b"\x12\x02\x18\x01"  # trainer_spec.model_type
    ends = b"".join(piece(name, 0.0, files.CONTROL) for name in ("<s>", "</s>"))
    content = piece("<unk>", 0.0, files.UNKNOWN) + ends + unigram
    with pytest.raises(RuntimeError, match="no pieces are loaded"):
        spm.SentencePieceProcessor(model_proto=content)
    with pytest.raises(UserError, match="no piece of text"):
        load(content, tmp_path)


def test_a_damaged_table_of_characters_is_refused_or_leads_nowhere_outside(
    sample_text: str, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    from mobilellm.tokenizer.sentencepiece_stages import is_whole

    content = train(sample_text[:20_000], **DEFAULTS, vocab_size=340)
    (tmp_path / "tokenizer.model").write_bytes(content)
    table = files.read_model(tmp_path / "tokenizer.model").charsmap
    assert is_whole(table)
    rng, refused = random.Random(0), 0
    for _ in range(60):
        changed = bytearray(table)
        for _ in range(40):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if not is_whole(bytes(changed)):
            refused += 1
            continue
        stage = normalizers.Precompiled(bytes(changed))
        for text in TEXTS:  # a place outside would end the process's library in a panic
            stage.normalize_str(text)
    assert refused > 0
    for end in (0, 3, 4, 1000, len(table) // 2):
        assert not is_whole(table[:end])


def test_a_text_in_one_piece_or_many_has_the_same_ids(sample_text: str, tmp_path: Path) -> None:
    from mobilellm.tokenizer.encoder import REFERENCE, Encoder

    content = train(sample_text[:50_000], **DEFAULTS, model_type="unigram", byte_fallback=False)
    tokenizer = load(content, tmp_path)
    text = sample_text[:1_100_000]
    found = [i for ids in Encoder(tokenizer, REFERENCE).long([text]) for i in ids.tolist()]
    assert found == tokenizer.encode(text)


@pytest.fixture(scope="module")
def plain(sample_text: str) -> bytes:
    return train(sample_text)


def piece(text: str, score: float, kind: int) -> bytes:
    """One piece as the file holds it."""
    body = (
        b"\x0a"
        + varint(len(text.encode()))
        + text.encode()
        + b"\x15"
        + struct.pack("<f", score)
        + b"\x18"
        + bytes([kind])
    )
    return b"\x0a" + varint(len(body)) + body


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (piece("zzqq", -5.0, files.NORMAL), "pieces of equal score"),
        (piece("zzqq", float("nan"), files.NORMAL), "score nan"),
        (piece("zzqq", 0.0, 9), "type 9"),
        (piece("", 0.0, files.NORMAL), "has 0 characters"),
        (piece("a" * 300_000, 0.0, files.NORMAL), "has 300000 characters"),
        (piece("<unk2>", 0.0, files.UNKNOWN), "no unknown piece, or several"),
        (piece("<unk>", 0.0, files.NORMAL), "a piece occurs twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_odd_piece_is_refused_at_once(
    added: bytes, words: str, plain: bytes, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        load(plain + added, tmp_path)


def test_a_file_of_millions_of_pieces_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_PIECES", 1000)
    with pytest.raises(UserError, match="more than 1000 pieces"):
        load(b"".join(piece(f"{i:x}", -float(i), files.NORMAL) for i in range(1001)), tmp_path)
    monkeypatch.setattr(files, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="the limit is 1000"):
        load(b"\0" * 1001, tmp_path)


def test_equal_scores_join_the_leftmost_first_or_are_refused(plain: bytes, tmp_path: Path) -> None:
    """Runs of spaces of one score, as Llama has them, are tried; where the two ways part, the
    model is refused."""
    content = plain + b"".join(
        piece(files.SPACE * n, -1e9, files.NORMAL) for n in (2, 4, 8, 5, 6, 3, 7)
    )
    ours, theirs = load(content, tmp_path), spm.SentencePieceProcessor(model_proto=content)
    for count in range(100):
        for text in (" " * count, "a" + " " * count, " " * count + "b\n" + " " * count):
            assert ours.encode(text) == theirs.encode(text)
    # In this order of the file, merges would make threes of all pairs before any four.
    content = plain + b"".join(
        piece(files.SPACE * n, -1e9, files.NORMAL) for n in (2, 3, 4, 5, 6, 7, 8)
    )
    with pytest.raises(UserError, match=r"runs of \d spaces"):
        load(content, tmp_path)


def test_the_slow_definition_is_sentencepieces_own(
    plain: bytes, tmp_path: Path, sample_text: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(plain)
    model = files.read_model(tmp_path / "tokenizer.model")
    score = {
        p: s
        for p, s, kind in zip(model.pieces, model.scores, model.types, strict=True)
        if kind == files.NORMAL
    }
    theirs = spm.SentencePieceProcessor(model_proto=plain)
    for line in sample_text.splitlines()[:200]:
        if line:
            parts = own.best_first(score, files.SPACE + line.replace(" ", files.SPACE))
            spelt = [p if p in score else f"<0x{ord(p):02X}>" for p in parts]
            assert spelt == theirs.encode(line, out_type=str)


def test_what_a_model_says_is_what_sentencepiece_reads(plain: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(plain)
    model, theirs = (
        files.read_model(tmp_path / "tokenizer.model"),
        spm.SentencePieceProcessor(model_proto=plain),
    )
    count = theirs.get_piece_size()
    assert model.pieces == [theirs.id_to_piece(i) for i in range(count)]
    assert model.scores == [theirs.get_score(i) for i in range(count)]
    assert [kind == files.BYTE for kind in model.types] == [theirs.is_byte(i) for i in range(count)]
    assert [kind == files.CONTROL for kind in model.types] == [
        theirs.is_control(i) for i in range(count)
    ]
    assert (model.normalizer_name, model.charsmap, model.add_dummy_prefix) == (
        "identity",
        b"",
        True,
    )
