"""The page that is one file: what lies in it, what it may do, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.interop.networks import checkpoint, network

from mobilellm.errors import UserError
from mobilellm.export import web
from mobilellm.interop.load import load
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

pytestmark = pytest.mark.usefixtures("wllama")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 300)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return checkpoint(tmp_path_factory.mktemp("web") / "model", network(), tokenizer)


@pytest.fixture(scope="module")
def page(source: Path) -> Path:
    out = source.with_name("page.html")
    result = convert(source, out, "web")
    assert result.precision == "Q8_0"
    assert result.same_first_choice is not None
    return out


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts by id or type."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append((self.tags[-1][1], data))

    def facts(self) -> dict:
        (text,) = [data for found, data in self.scripts if found.get("id") == "facts"]
        return json.loads(text)


def test_the_model_in_the_page_is_the_gguf(page: Path, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "model.gguf", "gguf", precision="Q8_0")
    parts = re.findall(rb'<script type="text/plain" class="model">(.*)</script>', page.read_bytes())
    within = b"".join(map(base64.b64decode, parts))
    one, other = tmp_path / "one.gguf", tmp_path / "model.gguf"
    one.write_bytes(within)
    tensors = [dict(load(path).network.state_dict()) for path in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


def test_the_page_asks_for_nothing_and_may_not(page: Path) -> None:
    text = page.read_text()
    elements = Elements(text)
    for tag, attributes in elements.tags:
        assert tag not in ("img", "iframe", "object", "embed", "link", "base"), tag
        assert not {"src", "srcset", "data", "action", "ping"} & set(attributes), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv")]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "data:"
    assert not re.search(r"https?:|\*|'unsafe-eval'|'self'", policy)
    (script,) = [data for found, data in elements.scripts if found.get("type") == "module"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"].split()[0] == f"'sha256-{digest}'"


def test_scripts_of_the_page_never_make_markup_of_text(page: Path) -> None:
    for _, script in Elements(page.read_text()).scripts:
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in script


def test_third_party_software_is_named_with_its_licence(page: Path) -> None:
    text = html.unescape(page.read_text())
    assert "Permission is hereby granted, free of charge" in text
    assert "wllama 3.13.0" in text
    assert "The ggml authors" in text


def test_controls_have_labels(page: Path) -> None:
    elements = Elements(page.read_text())
    labelled = {a["for"] for tag, a in elements.tags if tag == "label" and "for" in a}
    for tag, attributes in elements.tags:
        if tag in ("textarea", "input", "progress") and attributes.get("type") != "radio":
            assert attributes["id"] in labelled
    ids = [a["id"] for _, a in elements.tags if "id" in a]
    assert len(ids) == len(set(ids))
    described = [a["aria-describedby"] for _, a in elements.tags if "aria-describedby" in a]
    assert set(described) <= set(ids)
    roles = {a["role"] for _, a in elements.tags if "role" in a}
    assert {"log", "status", "alert"} <= roles


def test_names_and_templates_are_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = HOSTILE + "{% for m in messages %}{{ m.content }}" + HOSTILE + "{% endfor %}"
    hostile = Tokenizer(
        tokenizer.fast, name="x", bos_id=None, eos_id=tokenizer.eos_id, chat_template=template
    )
    source = checkpoint(tmp_path / "a<b>&'\"", network(), hostile)
    convert(source, tmp_path / "page.html", "web")
    elements = Elements((tmp_path / "page.html").read_text())
    facts = elements.facts()
    assert facts["name"] == "a<b>&'\""
    assert facts["turns"]["head"] == [HOSTILE]
    assert not [tag for tag, _ in elements.tags if tag in ("img", "b")]
    assert (
        len([a for tag, a in elements.tags if tag == "script" and a.get("type") == "module"]) == 1
    )


def test_special_tokens_are_named_with_their_ids(page: Path, tokenizer: Tokenizer) -> None:
    facts = Elements(page.read_text()).facts()
    assert facts["specials"] == [["<|endoftext|>", tokenizer.eos_id]]


def test_the_context_is_chosen(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "page.html", "web", context=64, precision="Q4_0")
    assert Elements((tmp_path / "page.html").read_text()).facts()["context"] == 64
    assert any(note.startswith("context: 64 tokens") for note in result.notes)


def test_a_name_without_html_is_a_folder_of_the_same(source: Path, tmp_path: Path) -> None:
    result = convert(source, tmp_path / "page", "web")
    assert result.precision == "Q8_0"
    files = {str(p.relative_to(tmp_path / "page")) for p in (tmp_path / "page").rglob("*.*")}
    names = ("engine", "wasm", "wasm-compat", "worker-compat")
    assert files == {"index.html", "model.gguf", *(f"engine/{name}.gz" for name in names)}
    text = (tmp_path / "page/index.html").read_text()
    assert len(text) < 100_000
    (policy,) = [a["content"] for _, a in Elements(text).tags if a.get("http-equiv")]
    assert "connect-src data: 'self';" in str(policy)
    assert not re.search(r"https?:|\*|'unsafe-eval'", str(policy))


def nothing_written(folder: Path, source: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {source.name}


def test_a_model_too_large_for_one_file_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_PAGE_BYTES", 100_000)
    with pytest.raises(UserError, match=r"page.html: 1 MB of model in a page, the limit") as error:
        convert(source, tmp_path / "page.html", "web")
    assert "without .html for a folder" in error.value.hint
    nothing_written(tmp_path, source)


def test_without_a_tokenizer_there_is_no_page(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", network())
    with pytest.raises(UserError, match="needs the model's tokenizer"):
        convert(source, tmp_path / "page.html", "web")
    nothing_written(tmp_path, source)


def test_an_engine_that_cannot_be_had_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise UserError("no npm", hint="pip install 'mobilellm[web]'")

    monkeypatch.setattr(web, "engine_parts", refused)
    with pytest.raises(UserError, match="no npm"):
        convert(source, tmp_path / "page.html", "web")
    nothing_written(tmp_path, source)
