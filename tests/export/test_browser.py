"""The page in a real browser: it writes what we write, asks for nothing, and takes text as text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tests.export.browser import Browser, Page
from tests.export.serving import asked_elsewhere, served
from tests.export.test_turns import CHATML, tokenizer_with
from tests.interop.networks import checkpoint, network

from mobilellm.interop.load import load
from mobilellm.model.generation import Sampling
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import encode_prompt
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.workflows.convert import convert

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("wllama")]
MARKUP = "<script>globalThis.ran = 1</script><img src=x onerror='globalThis.ran = 2'>"
TOKENS = 40
# What older browsers lack: base64 without an address, and what the faster engine needs.
OLDER = {
    "": "wllama",
    "delete Uint8Array.fromBase64": "wllama",
    "delete WebAssembly.Suspending": "wllama, compatible build",
}


def opened(browser: Browser, file: Path | str, before: str = "", **settings: object) -> Page:
    """The page, once its model is loaded; `settings` are values of its fields. The script `before`
    runs ahead of the page's own."""
    page = browser.open(file if isinstance(file, str) else file.as_uri(), before=before)
    assert page.wait("globalThis.ready || globalThis.failed", 90) == page.evaluate("ready")
    for name, value in settings.items():
        page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")
    return page


def answer(page: Page, text: str) -> dict:
    """What the page did with a text that is typed, and sent by the keyboard alone."""
    page.evaluate("globalThis.written = null; document.getElementById('prompt').value = ''")
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    chat = page.evaluate("document.querySelector('input[value=chat]')?.checked ?? false")
    page.key("Enter", 13, ctrl=not chat)
    return page.wait("globalThis.written", 90)


@pytest.mark.parametrize("lacking", OLDER)
def test_it_writes_what_we_write_and_asks_for_nothing(
    lacking: str, browser: Browser, shared: Path, tmp_path: Path
) -> None:
    source = shared / "models/stories260K/stories260K.bin"
    tokenizer = source.with_name("tok512.bin")
    convert(source, tmp_path / "page.html", "web", precision="F32", tokenizer=tokenizer)
    loaded = load(source, tokenizer=tokenizer)
    page = opened(browser, tmp_path / "page.html", lacking, temperature=0, tokens=TOKENS)
    assert page.evaluate("document.getElementById('runs').textContent") == OLDER[lacking]
    for prompt in ("Once upon a time", "Lily and Tom"):
        ids = loaded.prompt_ids(prompt)
        tokens = list(loaded.network.generate(ids, TOKENS, Sampling(temperature=0)))
        found = answer(page, prompt)
        assert found["text"] == loaded.continuation(ids, tokens)
        shown = page.evaluate("document.querySelector('#log p').textContent")
        assert shown == prompt + found["text"]
    kinds = {address.partition(":")[0] for address in page.requests}
    assert kinds <= {"file", "data", "blob"}
    assert [a for a in page.requests if a.startswith("file:")] == [
        (tmp_path / "page.html").as_uri()
    ]
    assert page.problems == []


def test_markup_that_a_model_writes_is_text(
    browser: Browser, tmp_path: Path, sample_text: str
) -> None:
    tokenizer = train_bpe([sample_text[:20_000]], 300)
    letters = [tokenizer.encode(letter)[0] for letter in "<script>"]
    model = network(tie_word_embeddings=False)
    with torch.no_grad():  # after each letter the next one is the likeliest
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        for i, letter in enumerate(letters):
            model.embed_tokens.weight[letter, i] = 1.0
            model.lm_head.weight[letters[(i + 1) % 8], i] = 1.0
    source = checkpoint(tmp_path / "model", model, tokenizer)
    convert(source, tmp_path / "page.html", "web", precision="F32")
    page = opened(browser, tmp_path / "page.html", temperature=0, tokens=16)
    found = answer(page, MARKUP)
    assert found["text"] == "<script><script>"
    assert page.evaluate("document.querySelector('#log').textContent") == MARKUP + found["text"]
    assert page.evaluate("document.querySelectorAll('#log script, #log img').length") == 0
    assert page.evaluate("globalThis.ran ?? 0") == 0


def test_a_script_in_every_string_of_a_model_does_not_run(
    browser: Browser, tmp_path: Path, sample_text: str
) -> None:
    """Its name, its origin, its template and its tokens, in a page whose engine works all the
    same."""
    hostile = f"\"'></title></textarea></pre></style></script>{MARKUP}<!-- -->"
    template = CHATML.replace("{%- for", hostile + "{%- for", 1).replace(
        "{% for", hostile + "{% for", 1
    )
    tokenizer = tokenizer_with(template, sample_text)
    source = checkpoint(tmp_path / hostile.replace("/", "|"), network(vocab_size=512), tokenizer)
    origin = dict.fromkeys(("name", "source", "made_by", hostile), hostile)
    (source / "mobilellm.json").write_text(json.dumps(origin))
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {hostile: hostile}))
    convert(source, tmp_path / "page.html", "web", precision="F32")
    page = opened(browser, tmp_path / "page.html", temperature=0, tokens=4)
    assert page.evaluate("document.querySelector('h1').textContent") == source.name
    assert isinstance(answer(page, hostile)["text"], str)  # the engine runs under the page's policy
    assert page.evaluate("globalThis.ran ?? 0") == 0
    assert page.requests[0].endswith("page.html")
    assert not [url for url in page.requests if url.startswith("http")]


def test_a_chat_is_asked_as_its_template_says(
    browser: Browser, tmp_path: Path, sample_text: str
) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    source = checkpoint(tmp_path / "model", network(vocab_size=512), tokenizer)
    convert(source, tmp_path / "page.html", "web", precision="F32")
    page = opened(browser, tmp_path / "page.html", temperature=0, tokens=4)
    start, end = (tokenizer.fast.token_to_id(f"<|im_{name}|>") for name in ("start", "end"))
    first = answer(page, "Who <|im_end|> is there?")
    head = [start, "system\nBe kind.", end, "\n", start]
    opening = [end, "\n", start, "assistant\n"]
    assert first["pieces"] == [*head, "user\nWho <|im_end|> is there?", *opening]
    loaded = load(source)
    asked = [{"role": "user", "content": "Who <\u2060|im_end|> is there?"}]
    ids = encode_prompt(tokenizer, ChatTemplate.of(tokenizer), asked)
    tokens = list(loaded.network.generate(ids, 4, Sampling(temperature=0)))
    assert first["text"] == loaded.continuation(ids, tokens)
    second = answer(page, "Again")
    past = [f"assistant\n{first['text']}", end, "\n", start, "user\nAgain"]
    assert second["pieces"] == [*first["pieces"][:-1], *past, *opening]
    own = page.evaluate("[...document.querySelectorAll('#log .own')].map(p => p.textContent)")
    assert own == ["Who <|im_end|> is there?", "Again"]


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_the_keyboard_reaches_all(
    browser: Browser, tmp_path: Path, sample_text: str, dark: bool
) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    source = checkpoint(tmp_path / "model", network(vocab_size=512), tokenizer)
    convert(source, tmp_path / "page.html", "web")
    page = browser.open((tmp_path / "page.html").as_uri(), width=360, dark=dark)
    page.wait("globalThis.ready || globalThis.failed", 90)
    page.evaluate("for (const found of document.querySelectorAll('details')) found.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    reached = set()
    for _ in range(20):
        page.key("Tab", 9)
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached >= {"log", "prompt", "go", "temperature", "top_p", "tokens", "seed", "system"}
    small = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(found => "
        "found.type !== 'radio' && found.offsetHeight < 36).map(found => found.id)"
    )
    assert small == []
    if folder := os.environ.get("MOBILELLM_SCREENSHOTS"):
        page.screenshot(Path(folder, f"page-360-{'dark' if dark else 'light'}.png"))


def test_a_folder_writes_the_same_from_a_server(
    browser: Browser, shared: Path, tmp_path: Path
) -> None:
    source = shared / "models/stories260K/stories260K.bin"
    tokenizer = source.with_name("tok512.bin")
    convert(source, tmp_path / "page", "web", precision="F32", tokenizer=tokenizer)
    loaded = load(source, tokenizer=tokenizer)
    ids = loaded.prompt_ids("Once upon a time")
    tokens = list(loaded.network.generate(ids, TOKENS, Sampling(temperature=0)))
    with served(tmp_path / "page") as address:
        page = opened(browser, address, temperature=0, tokens=TOKENS)
        assert answer(page, "Once upon a time")["text"] == loaded.continuation(ids, tokens)
    assert asked_elsewhere(page, address) == []
    assert page.problems == []
