"""data-stats shows conversations with every token coloured by its mask."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from tests.rows import write_rows

from mobilellm import cli
from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.data.stats import statistics
from mobilellm.data.token_folder import TokenFolder
from mobilellm.terminal.data_lines import masked_text
from mobilellm.tokenizer.tokenizer import train_bpe

HOSTILE = "<script>alert(1)</script> \x1b[2J und Grüße 😀"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_bpe(["what is a fox an animal " * 20], 300, reserved=4)
    rows = [{"instruction": f"{HOSTILE} {i}", "output": f"{HOSTILE} an animal"} for i in range(40)]
    write_rows(folder / "talks.jsonl", rows)
    prepare_chat([folder / "talks.jsonl"], folder / "data", tokenizer=tokenizer, held_out=0.2)
    return folder / "data"


def test_pieces_are_the_text_and_the_mask(data: Path) -> None:
    opened = TokenFolder.open(data)
    for sample in statistics(opened)["samples"]:
        pieces = sample["pieces"]
        text = "".join(piece["text"] for piece in pieces)
        assert text.startswith("<|im_start|>user\n<script>")
        assert "Grüße 😀" in text
        said = "".join(piece["text"] for piece in pieces if piece["trained"])
        assert said == f"{HOSTILE} an animal<|im_end|>"


def test_the_terminal_shows_each_token_and_obeys_none(data: Path) -> None:
    pieces = statistics(TokenFolder.open(data))["samples"][0]["pieces"]
    plain = masked_text(pieces, colours=False)
    assert plain.count("\u27e6") == plain.count("\u27e7") == 1
    assert "an animal<|im_end|>\u27e7\n" in plain
    assert "\x1b" not in plain
    coloured = masked_text(pieces, colours=True)
    own = re.sub(r"\x1b\[(30;46|30;106|0)m", "", coloured)
    assert "\x1b" not in own
    assert own == re.sub("[\u27e6\u27e7]", "", plain)
    assert coloured.count("\x1b[0m") == sum(piece["trained"] for piece in pieces)


def test_the_verb_and_its_page(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        cli.main(["data-stats", str(data), "--html", str(page)])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "trained on where marked" in printed
    assert "\x1b" not in printed
    text = page.read_text()
    assert "<script>alert" not in text
    assert re.search(r'<span class="token trained">[^<]*&lt;', text)
    assert re.search(r'<span class="token">[^<]*&lt;', text)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    with pytest.raises(SystemExit):
        cli.main(["data-stats", str(data)])
    assert "\x1b[30;46m" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
