"""The page itself: what it says of the model, its frame, and the parts that it is made of.

    facts = facts_of(model, notes)
    parts, licence = engine_parts()
    write_page(Path("demo.html"), model, facts, Path("demo.gguf"), llama_cpp(licence), parts)

All text that comes from the model (its name, its chat template, what it writes) is text in the
page: Jinja escapes it here, and page.js sets nothing but `textContent`. The page's
Content-Security-Policy lets it connect to nothing, and run no script but its own, which is named
by its hash, and the engine that it unpacks.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mobilellm.errors import UserError
from mobilellm.export.npm_client import read_pins
from mobilellm.export.npm_packages import package_files
from mobilellm.export.turns import turns_of
from mobilellm.interop.writer import ModelToWrite
from mobilellm.model.costs import ModelCosts
from mobilellm.tokenizer.special_tokens import special_tokens
from mobilellm.version import __version__

WLLAMA, WLLAMA_COMPAT = "@wllama/wllama", "@wllama/wllama-compat"
PART_BYTES = 6 << 20  # of the model in one element of the page; divides by 3, as base64 needs
CHANGES = (
    # Chromium starts no worker that is a module from file://, and this one needs not be a module.
    ('{type:"module"}', "{}"),
    # A worker of such a page may read its code from a data: address alone, which takes ten times as
    # long as compiling: engine_llama_cpp.js sends it compiled.
    (
        "const { verb, args, callbackId } = e.data;",
        (
            "if (e.data.compiled) { self.compiled = e.data.compiled; return; } "
            "const { verb, args, callbackId } = e.data;"
        ),
    ),
    (
        "noInitialRun: true,",
        (
            "noInitialRun: true, instantiateWasm: (imports, done) => { "
            "WebAssembly.instantiate(self.compiled, imports)"
            ".then(made => done(made, self.compiled), handleError); return {}; },"
        ),
    ),
)
"""Of the engine's script: what stands there once, and what stands there instead."""
OPENING = "Once upon a time"
GGML = "llama.cpp: Copyright (c) 2023-2026 The ggml authors; under the same terms."
HERE = (
    "The model, the program that runs it and this page are one file; what you write and what the "
    "model answers stays in this tab and is sent nowhere."
)

IN_FOLDER = (
    "The model and the program that runs it come from the folder of this page; what you write and "
    "what the model answers stays in this tab and is sent nowhere."
)


@functools.cache
def environment() -> Environment:
    """The page's templates, everything escaped."""
    return Environment(
        loader=PackageLoader("mobilellm.export", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def source(name: str) -> str:
    """The text of a file in templates/."""
    loader = environment().loader
    assert loader is not None
    return loader.get_source(environment(), name)[0]


def facts_of(model: ModelToWrite, notes: list[str]) -> dict[str, Any]:
    """What the page's script needs to know. A line is added to `notes` where there is no chat.

    `UserError` when the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(
            "a page needs the model's tokenizer", hint="give it with --tokenizer, or put it beside"
        )
    turns = None
    try:
        turns = turns_of(tokenizer)
        if turns is None:
            notes.append("no chat in the page: the tokenizer has no chat template")
    except UserError as error:
        notes.append(f"no chat in the page: {error.what}")
    alone = tokenizer.prefix_id
    return {
        "name": str(model.origin.get("name") or model.origin.get("source") or "model"),
        "context": model.context or model.network.config.max_position_embeddings,
        "begin": [tokenizer.bos_id] if tokenizer.add_bos else [],
        "alone": [] if alone is None else [alone],
        "specials": [*special_tokens(tokenizer).items()],
        "turns": None if turns is None else dataclasses.asdict(turns),
        "stop": [] if turns is None else turns.stop,
        "opening": OPENING,
    }


def rows_of(model: ModelToWrite, facts: dict[str, Any], size: int, engine: str) -> list[Any]:
    """What the page tells of the model, as names and texts."""
    config, costs = model.network.config, ModelCosts.of(model.network.config)
    cache = facts["context"] * costs.kv_cache_bytes_per_token(2)
    rows = [
        ("Parameters", f"{costs.parameters['total']:,}"),
        ("Layers", f"{config.num_hidden_layers}, {config.hidden_size} wide"),
        ("Attention", f"{config.num_attention_heads} heads, {config.num_key_value_heads} for keys"),
        ("Feed-forward", f"{config.intermediate_size} wide"),
        ("Vocabulary", f"{config.vocab_size:,} tokens"),
        ("Context", f"{facts['context']:,} tokens, {cache / 1e6:,.1f} MB of memory"),
        ("Weights", f"{model.number_type}, {size / 1e6:,.1f} MB"),
        ("Engine", engine),
    ]
    if model.quantized is not None:
        method = f"{model.quantized.scheme}, by {model.quantized.method}"
        rows.insert(7, ("Quantized", method))
    return rows


def summary_of(model: ModelToWrite) -> str:
    """One line under the name."""
    total = ModelCosts.of(model.network.config).parameters["total"]
    size = f"{total / 1e9:.2f} billion" if total >= 1e9 else f"{total / 1e6:.1f} million"
    return f"A language model of {size} parameters that runs in this page, without a network."


def engine_name() -> str:
    """The engine and its version."""
    return f"llama.cpp in WebAssembly (wllama {read_pins()[WLLAMA].version})"


@functools.cache
def engine_parts() -> tuple[dict[str, bytes], str]:
    """The engine's files, gzipped, by the ids that they have in the page, and its licence.

    `UserError` when the engine cannot be had.
    """
    fast = package_files(WLLAMA, "LICENCE", "esm/index.min.js", "esm/wasm/wllama.wasm")
    compatible = package_files(WLLAMA_COMPAT, "wasm/wllama.js", "wasm/wllama.wasm")
    script = fast["esm/index.min.js"].decode()
    for old, new in CHANGES:
        if script.count(old) != 1:
            raise UserError(f"{WLLAMA}: starts its worker in another way than expected")
        script = script.replace(old, new)
    parts = {
        "engine": script.encode(),
        "wasm": fast["esm/wasm/wllama.wasm"],
        "wasm-compat": compatible["wasm/wllama.wasm"],
        "worker-compat": compatible["wasm/wllama.js"],
    }
    packed = {name: gzip.compress(data, 6, mtime=0) for name, data in parts.items()}
    return packed, fast["LICENCE"].decode()


@dataclasses.dataclass(frozen=True)
class Engine:
    """What runs the model in a page."""

    name: str
    """As the page names it, with its version."""
    script: str
    """Its file in templates/, which gives page.js its `openEngine`."""
    notices: tuple[tuple[str, str], ...]
    """What it is and under which licence, and that licence's text."""
    own_files: bool = False
    """Whether the browser is to read its code as files beside the page; else page and code are one,
    or the code is unpacked by the page's script."""


def llama_cpp(licence: str) -> Engine:
    """The engine of `engine_parts`."""
    name = engine_name()
    return Engine(name, "engine_llama_cpp.js", ((f"{name}, MIT", f"{GGML}\n\n{licence}"),))


def write_page(
    path: Path,
    model: ModelToWrite,
    facts: dict[str, Any],
    file: Path,
    engine: Engine,
    parts: dict[str, bytes] | None,
) -> None:
    """Write the page at `path` around the model's file `file` and the engine's `parts`.

    Without `parts` neither lies in the page, which fetches them from its own folder.
    """
    beside = parts is None
    facts = facts | {"beside": beside}
    script = source(engine.script) + source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    mark, own = "<!-- parts -->", " 'self'" if beside else ""
    code = " 'self'" if engine.own_files else ""
    page = environment().get_template("page.html.j2").render(
        policy=Markup(
            f"default-src 'none'; script-src 'sha256-{digest}'{code} blob: 'wasm-unsafe-eval'; "
            f"worker-src{code} blob:; connect-src data:{own}; style-src 'unsafe-inline'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        version=__version__,
        name=facts["name"],
        summary=summary_of(model),
        style=Markup(source("page.css")),
        script=Markup(script),
        parts=Markup(mark),
        facts=facts,
        rows=rows_of(model, facts, file.stat().st_size, engine.name),
        notices=[{"what": what, "text": text} for what, text in engine.notices],
        place=IN_FOLDER if beside else HERE,
    )  # fmt: skip
    before, after = page.encode("utf-8", "replace").rsplit(mark.encode(), 1)
    with open(path, "xb") as out:
        out.write(before)
        for piece in () if parts is None else _elements(parts, file):
            out.write(piece)
        out.write(after)


def _elements(parts: dict[str, bytes], file: Path) -> Iterator[bytes]:
    """The engine's parts and the model as elements that hold base64."""
    for name, data in parts.items():
        yield f'<script type="text/plain" id="{name}">'.encode()
        yield base64.b64encode(data)
        yield b"</script>\n"
    with open(file, "rb") as model:
        while piece := model.read(PART_BYTES):
            yield b'<script type="text/plain" class="model">'
            yield base64.b64encode(piece)
            yield b"</script>\n"


def model_within(page: Path) -> Path:
    """The model's file as it lies in a page, written beside the page."""
    path = page.with_name("within.gguf")
    opening, closing = b'<script type="text/plain" class="model">', b"</script>"
    with open(page, "rb") as lines, open(path, "wb") as out:
        for line in lines:
            if line.startswith(opening):
                out.write(base64.b64decode(line[len(opening) :].partition(closing)[0]))
    return path
