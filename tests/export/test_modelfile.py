"""Ollama's template writes the prompt that transformers renders, by the rules of Go's language."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.export.test_turns import CHATML, PLAIN, TALK, TRIMMED, by_transformers, tokenizer_with
from tests.interop.networks import checkpoint, network

from mobilellm.export.modelfile import modelfile
from mobilellm.workflows.convert import convert

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}


def run_go(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that is used: strings, fields, if, else, range over messages,
    and one variable, without trimming. Others stop the test."""
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)
    tokens = [("text", p) if i % 2 == 0 else ("action", p) for i, p in enumerate(parts)]
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def block(at: int, message: dict[str, str], last: bool, on: bool) -> tuple[str, int, str]:
        """Text up to the action that ends the block, the place after it, and that action."""
        out = ""
        while at < len(tokens):
            kind, value = tokens[at]
            at += 1
            if kind == "text":
                out += value * on
            elif value.startswith('"'):
                out += ast.literal_eval(value) * on
            elif value == ".Content":
                out += message["content"] * on
            elif value == "$last := eq (len (slice $.Messages $i)) 1":
                continue
            elif value.startswith("range "):
                assert value == "range $i, $_ := .Messages"
                for number, one in enumerate(messages):
                    inner, after, _ = block(at, one, number == len(messages) - 1, on)
                    out += inner
                at = after
            elif value.startswith("if "):
                if found := re.fullmatch(r'if eq \.Role "(\w+)"', value):
                    holds = message["role"] == found[1]
                else:
                    holds = {"if $last": last, "if not $last": not last,
                             "if not .System": not system}[value]  # fmt: skip
                inner, at, ended = block(at, message, last, on and holds)
                out += inner
                if ended == "else":
                    inner, at, _ = block(at, message, last, on and not holds)
                    out += inner
            else:
                assert value in ("else", "end"), value
                return out, at, value
        return out, at, ""

    return block(0, {"role": "", "content": ""}, False, True)[0]


@pytest.mark.parametrize("template", [CHATML, TRIMMED, PLAIN])
def test_the_template_writes_what_transformers_renders(template: str, sample_text: str) -> None:
    tokenizer = tokenizer_with(template, sample_text)
    text = modelfile("m.gguf", tokenizer, network(vocab_size=420).config, {})
    assert text is not None
    go = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]
    for length in (1, 3, 5):
        talk = [m | {"content": m["content"].strip()} for m in TALK[:length]]
        expected = by_transformers(tokenizer, talk)
        if tokenizer.add_bos:  # llama.cpp puts it there
            expected = expected.removeprefix("<|im_start|>")
        assert run_go(go, talk) == expected
        if template != PLAIN:
            talk = [{"role": "system", "content": "Be brief."}, *talk]
            expected = by_transformers(tokenizer, talk)
            if tokenizer.add_bos:
                expected = expected.removeprefix("<|im_start|>")
            assert run_go(go, talk) == expected


def test_ends_of_turns_sampling_and_context_are_parameters(sample_text: str) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    text = modelfile("a b.gguf", tokenizer, network(vocab_size=420).config, GENERATION)
    lines = text.splitlines()
    assert lines[0] == "FROM ./a b.gguf"
    for line in (
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 128",
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
        "PARAMETER repeat_penalty 1.1",
    ):
        assert line in lines, line


def test_a_template_that_depends_on_its_messages_is_left_to_ollama(sample_text: str) -> None:
    depends = "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}"
    text = modelfile(
        "m.gguf", tokenizer_with(depends, sample_text), network(vocab_size=420).config, {}
    )
    assert 'TEMPLATE """' not in text
    assert "# No TEMPLATE" in text
    assert modelfile("m.gguf", tokenizer_with(None, sample_text), network().config, {}) is None


def test_it_lies_beside_the_gguf_and_replaces_no_other(tmp_path: Path, sample_text: str) -> None:
    tokenizer = tokenizer_with(CHATML, sample_text)
    folder = checkpoint(tmp_path / "m", network(vocab_size=tokenizer.vocab_size), tokenizer)
    notes = convert(folder, tmp_path / "one.gguf", "gguf").notes
    assert any("ollama create NAME -f Modelfile" in note for note in notes)
    first = (tmp_path / "Modelfile").read_text()
    assert first.startswith("FROM ./one.gguf\n")
    convert(folder, tmp_path / "two.gguf", "gguf")
    assert (tmp_path / "Modelfile").read_text() == first
    assert (tmp_path / "two.Modelfile").read_text().startswith("FROM ./two.gguf\n")
    (tmp_path / "one.gguf").unlink()
    convert(folder, tmp_path / "one.gguf", "gguf", precision="F16")
    assert not (tmp_path / "one.Modelfile").exists()
