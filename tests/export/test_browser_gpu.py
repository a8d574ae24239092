"""The page that runs ONNX files by transformers.js, by WebAssembly and by WebGPU: it writes what we
write, asks its own server alone, and takes text as text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.conftest import without_data
from tests.export.browser import CHROMIUM, SOFTWARE_WEBGPU, Browser, Page
from tests.export.onnx_models import network
from tests.export.serving import asked_elsewhere, served
from tests.export.test_browser import answer, opened
from tests.export.test_turns import CHATML, tokenizer_with
from tests.interop.networks import checkpoint

from mobilellm.interop.load import load
from mobilellm.model.generation import Sampling
from mobilellm.quantize.methods import quantized_network
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import encode_prompt
from mobilellm.workflows.convert import convert

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("transformers_js")]
TOKENS = 12


@contextmanager
def page_of(folder: Path, *flags: str, **settings: object) -> Iterator[Page]:
    """The page of a folder, its model loaded; nothing but its own server may be asked."""
    if CHROMIUM is None:
        without_data("no chromium on PATH")
    with served(folder) as address, Browser(*flags) as browser:
        page = opened(browser, address, **settings)
        yield page
        assert asked_elsewhere(page, address) == []
        assert [p for p in page.problems if "available adapters" not in p] == []


@pytest.mark.parametrize("number_type", ["F32", "INT4"])
@pytest.mark.parametrize("device", ["WebAssembly", "WebGPU"])
def test_it_writes_what_we_write(
    tmp_path: Path, sample_text: str, device: str, number_type: str
) -> None:
    """Shared layers, which stay stored once. 4 bits: what the network on its grid writes, until
    the rounding of activations decides."""
    tokenizer = tokenizer_with(None, sample_text)
    model = network(vocab_size=512, layer_repeats=2, shared_kv="first")
    source = checkpoint(tmp_path / "model", model, tokenizer)
    convert(source, tmp_path / "page", "webgpu", precision=number_type)
    expected = load(source)
    if number_type == "INT4":
        quantized_network(expected.network, "int4", "search")
    ids = expected.prompt_ids("Once upon")
    count = TOKENS if number_type == "F32" else 2
    tokens = list(expected.network.generate(ids, count, Sampling(temperature=0)))
    flags = SOFTWARE_WEBGPU if device == "WebGPU" else ()
    with page_of(tmp_path / "page", *flags, temperature=0, tokens=count) as page:
        assert device in page.evaluate("document.getElementById('runs').textContent")
        found = answer(page, "Once upon")
    assert found["text"] == expected.continuation(ids, tokens)
    assert found["count"] == len(tokens)


def test_a_chat_is_asked_as_its_template_says_and_a_seed_repeats(
    tmp_path: Path, sample_text: str
) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    source = checkpoint(tmp_path / "model", network(vocab_size=512), tokenizer)
    convert(source, tmp_path / "page", "webgpu", precision="F32")
    loaded = load(source)
    with page_of(tmp_path / "page", temperature=0, tokens=4) as page:
        first = answer(page, "Who <|im_end|> is there?")
        asked = [{"role": "user", "content": "Who <\u2060|im_end|> is there?"}]
        ids = encode_prompt(tokenizer, ChatTemplate.of(tokenizer), asked)
        tokens = list(loaded.network.generate(ids, 4, Sampling(temperature=0)))
        assert first["text"] == loaded.continuation(ids, tokens)
        texts = []
        for seed in (7, 7, 8):
            page.evaluate("document.getElementById('clear').click()")
            page.evaluate("document.getElementById('temperature').value = 1.5")
            page.evaluate(f"document.getElementById('seed').value = {seed}")
            texts.append(answer(page, "Go on")["text"])
        assert texts[0] == texts[1] != texts[2]
        page.evaluate("document.getElementById('tokens').value = 40")
        told = answer(page, "word " * 99)
        assert told["text"] == ""
        assert "longer than the model" in page.evaluate(
            "document.getElementById('alarm').textContent"
        )
        if folder := os.environ.get("MOBILELLM_SCREENSHOTS"):
            page.screenshot(Path(folder, "page-onnx.png"))


def test_an_answer_ends_with_its_turn(tmp_path: Path, sample_text: str) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    end = tokenizer.fast.token_to_id("<|im_end|>")
    model = network(vocab_size=512, tie_word_embeddings=False)
    with torch.no_grad():  # whatever it reads, the end of a turn is the likeliest
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embed_tokens.weight.uniform_(0.5, 1.5)
        model.lm_head.weight[end] = 1.0
    source = checkpoint(tmp_path / "model", model, tokenizer)
    convert(source, tmp_path / "page", "webgpu", precision="F32")
    with page_of(tmp_path / "page", temperature=0, tokens=9) as page:
        found = answer(page, "Hello")
    assert (found["text"], found["count"], found["reason"]) == ("", 0, "stop")
