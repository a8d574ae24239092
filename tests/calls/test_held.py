"""Output held to a schema: whatever the model, every text is a value that jsonschema accepts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.command_line import outcome
from tests.interop.networks import checkpoint, network

from mobilellm.calls.held import Held, HeldTo, call_schema
from mobilellm.errors import UserError
from mobilellm.model.generation import Sampling
from mobilellm.runtimes.ours import NetworkSession
from mobilellm.runtimes.running import generate
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe
from mobilellm.workflows.convert import convert

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")


def thing(**properties: Any) -> dict[str, Any]:
    """An object with these properties, all of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "text": thing(name=TEXT, other=TEXT),
    "numbers": thing(a={"type": "integer"}, b={"type": "number"}, c={"type": "boolean"}),
    "range": thing(a={"type": "integer", "minimum": 5, "maximum": 120}),
    "choice": thing(unit={"enum": ["celsius", "fahrenheit", None, 3]}),
    "list": thing(names={"type": "array", "items": TEXT, "minItems": 2, "maxItems": 5}),
    "nested": thing(at=thing(x={"type": "number"}, y={"type": ["number", "null"]})),
    "optional": {"type": "object", "properties": {"a": TEXT, "b": {"type": "integer"}}},
    "either": {"anyOf": [thing(a=TEXT), thing(b={"type": "array", "items": {"type": "integer"}})]},
    "pattern": thing(date={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}),
    "long": thing(a={"type": "string", "minLength": 3, "maxLength": 20}),
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": thing(value=TEXT, more={"type": "array", "items": {"$ref": "#/$defs/node"}})
        },
    },
    "anything": {},
}
TOOLS = [
    {"type": "function", "function": {"name": "book.table", "parameters": SCHEMAS["numbers"]}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:30_000]], 300)


def held_to(schema: dict[str, Any], tokenizer: Tokenizer, **changes: Any) -> Held:
    given = {"vocab_size": 320, "stop": [0]} | changes
    return HeldTo(schema, tokenizer, **given).begin()


def drawn(held: Held, tokenizer: Tokenizer, seed: int, most: int) -> str:
    """What random logits write, closed at the limit."""
    generator = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(most):
        token = int(held.masked(generator.normal(0, 3, 320).astype(np.float32)).argmax())
        if token == 0:
            assert held.complete
            break
        held.take(token)
        tokens.append(token)
        if held.finished:
            break
    return tokenizer.decode([*tokens, *held.closing()], skip_special_tokens=True)


@pytest.mark.parametrize(("name", "most"), itertools.product(SCHEMAS, (0, 1, 3, 10, 40, 200)))
def test_whatever_is_drawn_and_wherever_it_is_cut_off_is_valid(
    name: str, most: int, tokenizer: Tokenizer
) -> None:
    for seed in range(4):
        text = drawn(held_to(SCHEMAS[name], tokenizer), tokenizer, seed, most)
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("tagged", [False, True])
def test_a_call_of_tools(tokenizer: Tokenizer, tagged: bool) -> None:
    schema = call_schema(TOOLS)
    for seed in range(6):
        text = drawn(held_to(schema, tokenizer, tagged=tagged), tokenizer, seed, 60)
        if tagged:
            assert text.startswith("<tool_call>\n{")
            assert text.endswith("}\n</tool_call>")
            text = text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
        call = json.loads(text)
        jsonschema.validate(call, schema)
        assert list(call) == ["name", "arguments"]
        assert text.startswith('{"name": "')  # as chat templates have it


def test_the_text_ends_where_the_value_is_whole_and_nowhere_else(tokenizer: Tokenizer) -> None:
    held = held_to(thing(a={"type": "integer"}), tokenizer)
    flat = np.zeros(320, np.float32)
    for piece in tokenizer.encode('{"a": 12'):
        assert held.masked(flat)[0] == -np.inf
        assert not held.complete
        held.take(piece)
    (brace,) = tokenizer.encode("}")
    held.take(brace)
    assert held.complete
    assert held.finished
    assert np.isfinite(held.masked(flat)).nonzero()[0].tolist() == [0]
    with pytest.raises(UserError, match="schema: "):
        held.take(brace)


def test_without_a_token_that_ends_a_text_the_whole_value_does(tokenizer: Tokenizer) -> None:
    held = held_to({"type": "integer"}, tokenizer, stop=[])
    held.take(tokenizer.encode("7")[0])
    assert held.finished


def test_rows_beyond_the_tokenizer_are_never_drawn(tokenizer: Tokenizer) -> None:
    held = held_to(thing(a=TEXT), tokenizer)
    for piece in tokenizer.encode('{"a": "'):
        assert not np.isfinite(held.masked(np.zeros(320, np.float32))[300:]).any()
        held.take(piece)
    assert not np.isfinite(held.masked(np.zeros(320, np.float32))[300:]).any()


def test_a_value_that_cannot_be_closed_is_left_as_it_is(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mobilellm.calls.held.MAX_CLOSING", 30)
    held = held_to(thing(a={"type": "string", "minLength": 400}), tokenizer)
    held.take(tokenizer.encode("{")[0])
    assert held.closing() == []
    assert not held.complete
    held.take(tokenizer.encode('"')[0])  # it goes on from where it was


def test_generation_is_the_same_but_for_the_schema(tokenizer: Tokenizer) -> None:
    model = network(eos_token_id=0)
    free = HeldTo({}, tokenizer, vocab_size=320, stop=[0])
    sampling = Sampling(temperature=1.0, seed=3)
    held = free.begin()
    tokens = list(generate(NetworkSession(model), [5, 9], 60, sampling, held=held))
    json.loads(tokenizer.decode([*tokens, *held.closing()]))
    again = list(generate(NetworkSession(model), [5, 9], 60, sampling, held=free.begin()))
    assert tokens == again[: len(tokens)]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "nothing"}, "no output can be held to it (Invalid type: nothing)"),
        ({"not": {}}, 'no output can be held to it (Unimplemented keys: ["not"])'),
        ({"$ref": "http://example.com/s"}, "no output can be held to it (Resource"),
        ({"type": "string", "pattern": "(a"}, "no output can be held to it (regex parse error"),
    ],
)
def test_schemas_that_cannot_be_held_to(
    tokenizer: Tokenizer, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        held_to(schema, tokenizer, where="s.json")
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An untrained checkpoint `m`, the same as `m.gguf` and as an ONNX folder, and a schema."""
    found = tmp_path_factory.mktemp("held")
    checkpoint(found / "m", network(eos_token_id=0), tokenizer)
    convert(found / "m", found / "m.gguf", "gguf")
    convert(found / "m", found / "onnx", "onnx", precision="F32")
    (found / "s.json").write_text(json.dumps(SCHEMAS["text"]))
    return found


@pytest.mark.parametrize(
    ("file", "runtime"),
    [("m", "mobilellm"), ("m.gguf", "llama.cpp"), ("onnx", "onnxruntime")],
)
def test_every_runtime_writes_valid_text(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, runtime: str
) -> None:
    pytest.importorskip({"llama.cpp": "xllamacpp"}.get(runtime, "torch"))
    pytest.importorskip({"onnxruntime": "onnxruntime"}.get(runtime, "torch"))
    common = ("--prompt", "the king", "--max-new-tokens", 30, "--runtime", runtime, "--threads", 1)
    status, out, err = outcome(
        capsys, "generate", folder / file, *common, "--schema", folder / "s.json", "--json"
    )
    assert status == 0
    facts = json.loads(out)
    jsonschema.validate(json.loads(facts["text"]), SCHEMAS["text"])
    assert facts["complete"]
    assert facts["closed"] > 0
    assert err == f"the limit of 30 tokens: {facts['closed']} more close the value\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "s.json: no such file"),
        ("", "s.json: broken JSON"),
        ("{", "s.json: broken JSON"),
        ("[]", "s.json: a JSON schema is an object, not list"),
        ('{"type": "nothing"}', "s.json: no output can be held to it"),
    ],
)
def test_bad_schemas_are_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    said: str,
) -> None:
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    status, out, err = outcome(capsys, "generate", folder / "m", "--schema", tmp_path / "s.json")
    assert (status, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_model)
    size = tokenizer.vocab_size
    grammar = HeldTo(SCHEMAS["text"], tokenizer, vocab_size=size, stop=[tokenizer.eos_id or 0])
    torch.manual_seed(0)
    for _ in range(4):
        held, tokens = grammar.begin(), []
        for _ in range(40):
            token = int(held.masked(torch.randn(size).numpy() * 3).argmax())
            if token == tokenizer.eos_id:
                break
            held.take(token)
            tokens.append(token)
        text = tokenizer.decode([*tokens, *held.closing()])
        jsonschema.validate(json.loads(text), SCHEMAS["text"])
