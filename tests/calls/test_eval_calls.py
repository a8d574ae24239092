"""`eval --tasks api bfcl ifeval` and `prepare --chat` with services, as users type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.calls.test_scores import ADD, DIALOGUE, FUNCTIONS, SERVICE, instructed
from tests.command_line import call
from tests.conversations.test_prepare_chat import TALK_ALONE
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows

from mobilellm.calls.answers import Asker
from mobilellm.data.token_folder import TokenFolder
from mobilellm.runtimes.running import open_model
from mobilellm.tokenizer.chat_template import CHATML_TOKENS
from mobilellm.tokenizer.special_tokens import with_special_tokens
from mobilellm.tokenizer.tokenizer import train_bpe

BFCL_ROW = {
    "id": "0",
    "question": [[{"role": "user", "content": "Add 1 and 2"}]],
    "function": FUNCTIONS[:1],
    "ground_truth": ADD,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model `m` and the data files, a few lines each."""
    found = tmp_path_factory.mktemp("eval")
    plain = train_bpe(["the fox and the hen said what is a fox " * 20], 300)
    tokenizer = with_special_tokens(plain, CHATML_TOKENS)[0]
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    checkpoint(found / "m", network(**shape, eos_token_id=0), tokenizer)
    for name, rows in (
        ("sgd_schema", [SERVICE, {**SERVICE, "service_name": "Banks_2", "split": "test"}]),
        ("sgd_test", [DIALOGUE] * 2),
        ("bfcl_v4_simple_python", [BFCL_ROW]),
        ("bfcl_v4_irrelevance", [BFCL_ROW]),
        ("ifeval_prompts", [instructed("punctuation:no_comma")]),
    ):
        write_rows(found / f"{name}.jsonl", rows)
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a few tokens: what an untrained model says does not matter."""
    longest = {"api": 5, "bfcl": 5, "ifeval": 5}
    monkeypatch.setattr("mobilellm.terminal.call_lines.LONGEST", longest)


@pytest.mark.usefixtures("short")
def test_scores_are_printed_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("langdetect")
    given = ("eval", folder / "m", "--data", folder, "--limit", 3, "--out", folder / "out")
    out, _ = call(capsys, *given, "--tasks", "api", "bfcl", "ifeval")
    for text in (
        "api EM_intent EM_structure Rouge-1 Rouge-L",
        "all 0.0 [0.0, 0.0] 0.0 [0.0, 0.0]",
        "MobileLLM-350M 65.3 48.8 46.8 44.6 other data (arXiv 2402.14905, table 6)",
        "2 calls and 1 replies; a call in place of a reply: 0.0 [0.0, 0.0]; without room: 0",
        "bfcl simple_python 0.0 [0.0, 0.0] (1 items)",
        "bfcl irrelevance 100.0 [100.0, 100.0] (1 items)",
        "ifeval prompts_strict ",
        "ifeval number_sentences: sentences by a splitter of ours, not by nltk's punkt",
    ):
        assert text in " ".join(out.split()), text
    written = json.loads((folder / "out/scores.json").read_text())["m"]
    assert list(written) == ["api", "bfcl", "ifeval"]
    assert written["api"]["unseen"]["EM_intent"]["count"] == 0
    out, _ = call(capsys, "eval", folder / "m", "--data", folder, "--tasks", "api", "--json")
    assert json.loads(out)["m"]["api"]["all"]["Rouge-1"]["count"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--tasks", "api"), "sgd_schema is read from a folder; give --data FOLDER"),
        (("--tasks", "api", "commonsense"), "api and others are scored apart"),
        (
            ("--tasks", "api", "--data", "{folder}/m"),
            "has no sgd_schema.jsonl or sgd_schema.jsonl.gz",
        ),
        (("--tasks", "bfcl", "--data", "{folder}/m"), "has no bfcl_v4_*.jsonl or .jsonl.gz"),
        (("--tasks", "bfcl"), "is read from a folder"),
        (("--tasks", "api", "--data", "{folder}", "--limit", "0"), "--limit 0: must be 1 or more"),
    ],
)
def test_faults_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], said: str
) -> None:
    words = [word.format(folder=folder) for word in given]
    out, err = call(capsys, "eval", folder / "m", *words, status=2)
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_conversation_without_room_has_no_answer(folder: Path) -> None:
    with open_model(folder / "m") as model:
        ask = Asker(model, 5)
        assert isinstance(ask([{"role": "user", "content": "what"}], None), str)
        assert ask([{"role": "user", "content": "what " * 3000}], None) is None


def test_what_turns_have_in_common_is_read_once(folder: Path) -> None:
    turns = [
        [{"role": "user", "content": "what"}],
        [{"role": "user", "content": "what " * 30}],
        [{"role": "user", "content": "who"}, {"role": "assistant", "content": "a"},
         {"role": "user", "content": "what"}],
    ]  # fmt: skip
    with open_model(folder / "m") as model:
        alone = [Asker(model, 5)(turn, FUNCTIONS[:1]) for turn in turns]
        ask = Asker(model, 5)
        read: list[int] = []
        feed = model.session.feed
        model.session.feed = lambda ids: (read.append(len(ids)), feed(ids))[1]  # type: ignore[method-assign]
        assert [ask(turn, FUNCTIONS[:1]) for turn in turns] == alone
        prompts = [n for n in read if n > 1]
        assert prompts[0] > 3 * max(prompts[2:])  # the functions stand before all of them


def test_dialogues_with_services_are_prepared(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "talks.jsonl").write_text((json.dumps(DIALOGUE) + "\n") * 40)
    given = ("prepare", "--chat", folder / "sgd_schema.jsonl", tmp_path / "talks.jsonl")
    call(capsys, *given, "--tokenizer", folder / "m", "--out", tmp_path / "d", "--held-out", 0.2)
    data = TokenFolder.open(tmp_path / "d")
    said = data.tokenizer().decode(data.tokens("train").read(0, 1500).tolist())
    assert '"name": "Send"' in said  # the tool, and the call
    assert '{"name": "Send", "arguments": {"amount": "5"}}' in said
    _, err = call(
        capsys, "prepare", "--chat", tmp_path / "talks.jsonl", "--tokenizer", folder / "m",
        "--out", tmp_path / "e", status=2,
    )  # fmt: skip
    assert "service 'Banks_1' is not defined; give its definitions first" in err
    assert len(err.splitlines()) == 1
    _, err = call(
        capsys, "prepare", "--chat", folder / "sgd_schema.jsonl", "--tokenizer", folder / "m",
        "--out", tmp_path / "e", status=2,
    )  # fmt: skip
    assert "definitions of services alone; give dialogues, too" in err


@pytest.mark.usefixtures("short")
def test_a_model_whose_template_has_no_tools_is_asked_by_chatml(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "m", tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text(TALK_ALONE)
    given = ("eval", tmp_path / "m", "--data", folder, "--tasks", "api", "--limit", 1)
    _, err = call(capsys, *given)
    assert "note: m: its chat template does not write tools; asked by ChatML instead\n" in err
    with open_model(tmp_path / "m") as model:
        read: list[int] = []
        feed = model.session.feed
        model.session.feed = lambda ids: (read.extend(ids), feed(ids))[1]  # type: ignore[method-assign]
        Asker(model, 2)([{"role": "user", "content": "Add 1 and 2"}], FUNCTIONS[:1])
        assert FUNCTIONS[0]["name"] in model.tokenizer.decode(read)
