"""Tokenizers from files: which ids delimit documents, and what is refused in one line."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.budget import held
from mobilellm.errors import UserError
from mobilellm.hardware.device_memory import forget_peak, peak_memory
from mobilellm.tokenizer.tokenizer import END_OF_TEXT, Tokenizer, train_bpe


@pytest.fixture(scope="module")
def bpe(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:50_000]], 600)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=("Cs",)))
    | st.lists(st.sampled_from([END_OF_TEXT, " ", "\n", "é", "'s"])).map("".join)
)
def test_byte_level_bpe_is_lossless_on_any_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.eos_id not in ids
    assert bpe.encode_batch([text, text]) == [ids, ids]


def test_training_is_deterministic_and_fills_the_vocabulary(
    bpe: Tokenizer, sample_text: str
) -> None:
    again = train_bpe(iter([sample_text[:50_000]]), 600)
    assert again.sha256 == bpe.sha256
    assert (bpe.vocab_size, bpe.eos_id, bpe.bos_id, bpe.token(0)) == (600, 0, None, END_OF_TEXT)


def test_the_smallest_vocabulary_is_all_bytes_and_the_end(sample_text: str) -> None:
    tokenizer = train_bpe([sample_text[:1000]], 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("naïve")) == 6
    for size in (256, 0, -1, 1 << 21):
        with pytest.raises(UserError, match="a vocabulary of"):
            train_bpe(["text"], size)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, (None, 0)),
        ({"config.json": {"eos_token_id": [7, 8], "bos_token_id": 9}}, (9, 7)),
        (
            {"config.json": {"eos_token_id": 7}, "tokenizer_config.json": {"eos_token": "A"}},
            (None, "A"),
        ),
        (
            {"special_tokens_map.json": {"bos_token": {"content": "A"}, "eos_token": "B"}},
            ("A", "B"),
        ),
        (
            {
                "special_tokens_map.json": {"eos_token": "A"},
                "tokenizer_config.json": {"eos_token": {"content": "B"}},
            },
            (None, "B"),
        ),
        (
            {
                "tokenizer_config.json": {"eos_token": "not a token"},
                "config.json": {"eos_token_id": 7},
            },
            (None, 7),
        ),
        ({"config.json": {"eos_token_id": True, "bos_token_id": -1}}, (None, None)),
        ({"config.json": {"eos_token_id": 600, "bos_token_id": "1"}}, (None, None)),
        ({"config.json": {"eos_token_id": 1 << 70, "bos_token_id": []}}, (None, None)),
        ({"config.json": [], "tokenizer_config.json": {"chat_template": "{{ x }}"}}, (None, 0)),
    ],
)
def test_which_ids_delimit_documents(
    bpe: Tokenizer, tmp_path: Path, files: dict, ids: tuple
) -> None:
    bpe.save(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == tuple(
        bpe.fast.token_to_id(i) if isinstance(i, str) else i for i in ids
    )
    assert loaded.name == tmp_path.name


def test_a_file_by_a_bare_name_is_named_after_its_folder(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.load(Path("tokenizer.json")).name == tmp_path.name


def test_chat_templates_are_kept(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    loaded = Tokenizer.load(tmp_path / "a")
    assert loaded.chat_template == "{{ messages }}"
    loaded.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").chat_template == "{{ messages }}"
    (tmp_path / "a/chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        Tokenizer.load(tmp_path / "a")


def damaged(good: dict) -> dict[str, object]:
    """Contents of a tokenizer.json that are none, by what is wrong."""
    cases: dict[str, object] = {"a list": [], "an empty object": {}}

    def change(name: str, **parts: object) -> None:
        cases[name] = copy.deepcopy(good) | parts

    change("no vocabulary", model=good["model"] | {"vocab": {}})
    change("a merge of unknown pieces", model=good["model"] | {"merges": [["zz", "qq"]]})
    change(
        "an id of four billion",
        model=good["model"] | {"vocab": good["model"]["vocab"] | {"big": 4_000_000_000}},
    )
    change("a negative id", model=good["model"] | {"vocab": good["model"]["vocab"] | {"neg": -1}})
    change("a library panic", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    change(
        "a broken pattern",
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    return cases


def test_damaged_files_are_one_line(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    contents: dict[str, bytes] = {
        name: json.dumps(case).encode()
        for name, case in damaged(json.loads(file.read_text())).items()
    }
    contents |= {
        "binary": bytes(range(256)),
        "empty": b"",
        "cut off": file.read_bytes()[:-300],
        "zeros": bytes(100),
    }
    for name, content in contents.items():
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value), name
    for folder in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"no such tokenizer|neither tokenizer\.json nor"):
            Tokenizer.load(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_a_large_id_is_refused_before_memory_is_taken_for_all_below_it(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["big"] = 100_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    forget_peak()
    before = held()
    with pytest.raises(UserError, match="a vocabulary of 100000001"):
        Tokenizer.load(tmp_path)
    assert peak_memory(torch.device("cpu")) - before < 100 << 20


def test_interrupts_are_not_taken_for_damage(
    bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bpe.save(tmp_path)

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("mobilellm.tokenizer.tokenizer.read_regular", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_text_without_a_token_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
            }
        )
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match="cannot tokenize this text"):
        tokenizer.encode("b")


def test_the_token_before_a_text_is_bos_else_eos(small_data: Path) -> None:
    tokenizer = Tokenizer.load(small_data / "tokenizer")
    for bos, eos, wanted in ((3, 4, 3), (None, 4, 4), (3, None, 3), (None, None, None)):
        tokenizer.bos_id, tokenizer.eos_id = bos, eos
        assert tokenizer.prefix_id == wanted
