"""Quantizing a model on disk, and the table of what each way to do so costs.

    result = quantize(Path("runs/demo"), Path("demo-int4"), scheme="int4", method="search")
    rows = table(Path("runs/demo"), Path("book.txt"))     # a Row for each number type and method

A quantized model is an ordinary checkpoint whose weights lie on the grid, with two files beside
them (quantize/quantized.py). `convert` writes the same integers into every format.

A text serves two ends: method "gptq" is calibrated on it, and perplexity is measured on it. One
text is divided: its first half calibrates and its second half is scored; with a calibration text
of its own all of it is scored.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm.cards.model_card import facts_of
from mobilellm.errors import UserError, unknown_name
from mobilellm.evaluate.held_out import read_text
from mobilellm.evaluate.perplexity import Score, TokenList, perplexity
from mobilellm.files import check_absent, new_folder, sha256_file
from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load, source_hash
from mobilellm.interop.loaded import Loaded
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.quantize.activations import rounded_activations
from mobilellm.quantize.methods import quantized_network
from mobilellm.quantize.quantized import Quantized
from mobilellm.quantize.schemes import EMBEDDINGS, METHODS, SCHEMES
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.version import __version__

SEQUENCES, SEQUENCE_LENGTH = 32, 512
"""Of the calibration text, at most; they lie evenly spread over it."""
WINDOW = 2048
"""Tokens in a window of the text that is scored, at most the model's context."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A text made into tokens."""

    calibration: Tensor | None
    """(N, T) ids; None where nothing is calibrated."""
    facts: dict[str, Any] | None
    """What is recorded of the calibration: name, sha256 of the file, tokens."""
    scored: TokenList | None
    """What perplexity is measured on."""
    scored_bytes: int

    def score(self, network: Network, precision: Precision = Precision.FP32) -> Score | None:
        """How well a network predicts the text; None where there is none."""
        if self.scored is None:
            return None
        length = min(WINDOW, network.config.max_position_embeddings)
        return perplexity(
            network,
            self.scored,
            self.scored_bytes,
            sequence_length=length,
            precision=precision,
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was quantized, and what it cost."""

    source: str
    source_sha256: str
    out: str
    scheme: str
    method: str
    embedding: str
    calibration: dict[str, Any] | None
    bytes_before: int
    """Of the weights in float32."""
    bytes_after: int
    """Of the integers and scales; what is not on the grid is counted with 16 bits."""
    before: Score | None
    """On the text, in float32; None without one."""
    after: Score | None
    """On the same text, with activations rounded where the scheme does."""
    seconds: float
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to store the model, measured."""

    scheme: str
    """Key of SCHEMES, or "fp32" and "bf16" for the model as it is."""
    method: str
    """Key of METHODS; empty for the model as it is."""
    embedding: str
    """Key of EMBEDDINGS."""
    bytes: int
    """Of its weights; what a scheme leaves alone is counted with 16 bits."""
    loss: float
    """Nats a token."""
    perplexity: float
    ratio: float
    """Perplexity over that in fp32."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Accuracy by task, and "average"."""
    seconds: float = 0.0
    """To quantize it."""


def quantize(
    source: Path,
    out: Path,
    *,
    scheme: str | None = None,
    method: str | None = None,
    embedding: str | None = None,
    text: Path | None = None,
    calibration: Path | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write the model at `source` to `out`, quantized.

    What is not given is what the model was trained for, else int4 by search with an embedding of 8
    bits. `out` appears only when it is whole and has been read back. `max_tokens` ends the text
    that is scored. `UserError` for a model that is quantized already, and an `out` that exists.
    """
    check_absent(out)
    loaded = _unquantized(source)
    notes: list[str] = []
    trained = loaded.origin.get("trained_for")
    if isinstance(trained, dict) and scheme in (None, trained.get("scheme")):
        scheme = scheme or str(trained.get("scheme"))
        method = method or str(trained.get("method"))
        embedding = embedding or str(trained.get("embedding"))
        notes.append(f"the model was trained for {scheme}, method {trained.get('method')}")
    scheme, method, embedding = scheme or "int4", method or "search", embedding or "int8"
    _check(scheme, method, embedding)
    if method == "gptq" and text is None and calibration is None:
        raise UserError("method gptq is calibrated on a text", hint="give one with --text FILE")
    texts = _texts(loaded, source, text, calibration, method == "gptq", max_tokens)
    before = texts.score(loaded.network)
    start = time.monotonic()
    quantized = quantized_network(
        loaded.network, scheme, method, embedding, texts.calibration, progress
    )
    seconds = time.monotonic() - start
    sha256 = source_hash(source)
    facts = {"source": source.name, "source_sha256": sha256, "torch": torch.__version__}
    quantized = replace(quantized, facts=quantized.facts | facts | {"calibration": texts.facts})
    settings = {"scheme": scheme, "method": method, "embedding": embedding}
    origin = {
        "made_by": f"mobilellm {__version__} quantize",
        "source": source.name,
        "source_sha256": sha256,
        "settings": settings,
        "came_from": loaded.origin,
    }
    if loaded.tokenizer is None:
        notes.append("no tokenizer: the source has none")
    with new_folder(out) as staging:
        save_checkpoint(
            staging,
            loaded.network,
            loaded.tokenizer,
            origin,
            generation=loaded.generation,
            card=facts_of(source),
        )
        quantized.save(staging, loaded.config)
        load(staging)  # refuses weights that are not on the grid that the files name
    before_bytes = sum(4 * p.numel() for p in loaded.network.parameters())
    return QuantizeResult(
        source=str(source),
        source_sha256=sha256,
        out=str(out),
        **settings,
        calibration=texts.facts,
        bytes_before=before_bytes,
        bytes_after=stored_bytes(loaded.network, quantized),
        before=before,
        after=texts.score(rounded_activations(loaded.network, quantized)),
        seconds=seconds,
        notes=notes,
    )


def table(
    source: Path,
    text: Path,
    *,
    calibration: Path | None = None,
    schemes: Sequence[str] = tuple(SCHEMES),
    methods: Sequence[str] = METHODS,
    embeddings: Sequence[str] = EMBEDDINGS,
    tasks: Callable[[Network, Tokenizer], dict[str, float]] | None = None,
    max_tokens: int | None = None,
    ready: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure the model in fp32, in bf16, and with each scheme, method and embedding.

    Schemes of the same weights are quantized once. `tasks` scores a network on tasks; `ready` takes
    each row as soon as it is measured. Errors as `quantize`.
    """
    for scheme in schemes:
        for method in methods:
            for embedding in embeddings:
                _check(scheme, method, embedding)
    loaded = _unquantized(source)
    tokenizer = loaded.require_tokenizer(source)
    texts = _texts(loaded, source, text, calibration, "gptq" in methods, max_tokens)
    network = loaded.network
    kept = {name: p.detach().clone() for name, p in network.named_parameters()}
    rows: list[Row] = []

    def add(
        scheme: str,
        method: str,
        embedding: str,
        size: int,
        measured: Network,
        precision: Precision = Precision.FP32,
        seconds: float = 0.0,
    ) -> None:
        score = texts.score(measured, precision)
        assert score is not None
        first = rows[0].perplexity if rows else score.perplexity
        row = Row(
            scheme=scheme,
            method=method,
            embedding=embedding,
            bytes=size,
            loss=score.loss,
            perplexity=score.perplexity,
            ratio=score.perplexity / first,
            tasks={} if tasks is None else tasks(measured, tokenizer),
            seconds=seconds,
        )
        rows.append(row)
        if ready is not None:
            ready(row)

    numbers = sum(p.numel() for p in network.parameters())
    add("fp32", "", "float", 4 * numbers, network)
    with _restored(network, kept):
        for parameter in network.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
        add("bf16", "", "float", 2 * numbers, network, Precision.BF16)
    for bits in dict.fromkeys(SCHEMES[scheme].bits for scheme in schemes):
        alike = [scheme for scheme in schemes if SCHEMES[scheme].bits == bits]
        for method in methods:
            for embedding in embeddings:
                with _restored(network, kept):
                    start = time.monotonic()
                    quantized = quantized_network(
                        network, alike[0], method, embedding, texts.calibration
                    )
                    seconds = time.monotonic() - start
                    size = stored_bytes(network, quantized)
                    for scheme in alike:
                        measured = rounded_activations(
                            _twin(network), replace(quantized, scheme=scheme)
                        )
                        add(scheme, method, embedding, size, measured, seconds=seconds)
    return rows


def stored_bytes(network: Network, quantized: Quantized) -> int:
    """Bytes of integers and of scales of 16 bits, and of what is not on the grid in 16 bits."""
    total = 0
    for name, parameter in network.named_parameters():
        weight = quantized.weights.get(name)
        if weight is None:
            total += 2 * parameter.numel()
        else:
            total += parameter.numel() * weight.bits // 8 + 2 * weight.scales.numel()
    return total


def _check(scheme: str, method: str, embedding: str) -> None:
    for kind, name, known in (
        ("scheme", scheme, SCHEMES),
        ("method", method, METHODS),
        ("embedding", embedding, EMBEDDINGS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)


def _unquantized(source: Path) -> Loaded:
    """The model at `source`. `UserError` when it is quantized."""
    loaded = load(source)
    if loaded.quantized is not None:
        raise UserError(
            f"{source}: is quantized already ({loaded.quantized.scheme} by "
            f"{loaded.quantized.method})",
            hint="quantize the model that it was made from",
        )
    return loaded


def _texts(
    loaded: Loaded,
    source: Path,
    text: Path | None,
    calibration: Path | None,
    calibrated: bool,
    max_tokens: int | None,
) -> Texts:
    """The tokens to calibrate on, where that is done, and those to score."""
    ids = np.zeros(0, dtype=np.int64)
    scored, scored_bytes, chosen, facts = None, 0, None, None
    if text is not None:
        tokenizer = loaded.require_tokenizer(source)
        ids = np.asarray(tokenizer.encode(read_text(text)), dtype=np.int64)
        start = len(ids) // 2 if calibrated and calibration is None else 0
        part = ids[start:][:max_tokens]
        ids = ids[:start]
        if len(part) < 2:
            raise UserError(f"{text}: too short to score", hint="give a longer text")
        scored, scored_bytes = TokenList(part), len(tokenizer.decode(part.tolist()).encode())
    origin = calibration or text
    if calibrated and origin is not None:
        if calibration is not None:
            tokenizer = loaded.require_tokenizer(source)
            ids = np.asarray(tokenizer.encode(read_text(calibration)), dtype=np.int64)
        chosen = _sequences(ids, loaded.config.max_position_embeddings)
        if not chosen.numel():
            raise UserError(f"{origin}: too short to calibrate on", hint="give a longer text")
        facts = {
            "text": origin.name,
            "sha256": sha256_file(origin),
            "tokens": chosen.numel(),
            "sequences": len(chosen),
        }
    return Texts(calibration=chosen, facts=facts, scored=scored, scored_bytes=scored_bytes)


def _sequences(ids: np.ndarray, context: int) -> Tensor:
    """Sequences (N, T) spread evenly over a text, without overlap."""
    length = min(SEQUENCE_LENGTH, context, len(ids))
    count = min(SEQUENCES, len(ids) // max(1, length))
    starts = [i * (len(ids) // max(1, count)) for i in range(count)]
    rows = [ids[start : start + length] for start in starts]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, 0, dtype=torch.int64)


@contextlib.contextmanager
def _restored(network: Network, kept: dict[str, Tensor]) -> Iterator[None]:
    """Give the parameters their values of before back when the block ends."""
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(kept[name])


def _twin(network: Network) -> Network:
    """A network of modules of its own with the same parameters and tables."""
    same = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): tensor for tensor in same})
