"""report.html: what a run did, on one page that needs no network.

    write_report(Path("runs/demo"))      # -> runs/demo/report.html

Written for finished runs and for interrupted ones alike; what is not there yet is left out. The
template escapes all text: samples are whatever the model produced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mobilellm.damage import reading
from mobilellm.records import Result
from mobilellm.report.chart import EMPTY, Line, bar_chart, line_chart, smooth
from mobilellm.report.figures import count, fixed, grouped, is_finite, percent, ratio, tables
from mobilellm.report.frame import write_page
from mobilellm.report.run_files import RunFiles, mapping

BASELINES = {
    "unigram": "unigram (token frequencies)",
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "xz_after_train": "xz -9e, primed with the training text",
}
DEMO_PAGE = "demo.html"  # in a run's folder: the page in which its model writes
SOURCE_COUNTS = ("documents", "tokens", "bytes")
SMOOTHING = 50
"""A smoothed curve averages over this part of its points."""


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path."""
    with reading(run, "a run"):
        return _write(run, RunFiles.read(run))


def _write(run: Path, files: RunFiles) -> Path:
    result = files.result
    path = run / "report.html"
    write_page(
        path,
        "run.html.j2",
        kind="mobilellm run",
        title=str(result.get("name", run.resolve().name)),
        result=result,
        last=files.last,
        steps=len(files.rows),
        broken=files.broken,
        not_finite=sum("loss" in row and not is_finite(row["loss"]) for row in files.rows),
        baselines=baselines_chart(result),
        before=before_chart(result),
        curves=curves(files),
        model_facts=model_facts(mapping(result.get("model"))),
        data_facts=data_facts(mapping(result.get("data"))),
        recipe=files.recipe,
        environment=files.environment,
        page=DEMO_PAGE if (run / DEMO_PAGE).is_file() else None,
    )
    return path


def baselines_chart(result: Result) -> Markup:
    """Bits a byte of the model and of simpler predictors as bars, the worst first."""
    held_out, others = mapping(result.get("held_out")), mapping(result.get("baselines"))
    if not held_out or not others:
        return EMPTY
    rows = [(text, others[key], False) for key, text in BASELINES.items() if key in others]
    rows.append(("this model", held_out.get("bits_per_byte"), True))
    rows.sort(key=lambda row: row[1] if is_finite(row[1]) else math.inf, reverse=True)
    return _bits_chart(rows, "same held-out text", held_out)


def before_chart(result: Result) -> Markup:
    """Bits a byte before and after a training that started from a model, as bars."""
    after, before = mapping(result.get("held_out")), mapping(result.get("held_out_before"))
    if not after or not before:
        return EMPTY
    rows = [
        ("the model it started from", before.get("bits_per_byte"), False),
        ("this model", after.get("bits_per_byte"), True),
    ]
    return _bits_chart(rows, mapping(result.get("data")).get("scored", "held-out text"), after)


def _bits_chart(rows: list[tuple[str, Any, bool]], text: str, score: Mapping[str, Any]) -> Markup:
    size = grouped(score.get("bytes"))
    return bar_chart(rows, f"Bits a byte on the {text} ({size} bytes); lower is better")


def curves(files: RunFiles) -> list[Markup]:
    """The charts of a run's metrics over its steps; one without points is empty."""
    loss = files.points("loss")
    smoothed = smooth(loss, len(loss) // SMOOTHING)
    held_out_loss = files.points("held_out_loss")
    held_out = files.points("held_out_bits_per_byte")

    def single(title: str, name: str, key: str, color: str, unit: str) -> Markup:
        line = Line(name, files.points(key), color)
        return line_chart(title, [line], "step", unit, zero=True)

    def pairs(title: str, key: str, unit: str, zero: bool = False) -> Markup:
        lines = [
            Line("each step", files.points(key), "c1", faint=True),
            Line("held-out", files.points(f"held_out_{key}"), "c2", marked=True),
        ]
        return line_chart(f"Pairs of answers: {title}", lines, "step", unit, zero=zero)

    return [
        line_chart(
            "Loss",
            [
                Line("each step", loss, "c1", faint=True),
                Line("training, smoothed", smoothed, "c1"),
                Line("held-out", held_out_loss, "c2", marked=True),
            ],
            "step",
            "nats a token",
        ),
        line_chart(
            "Held-out", [Line("held-out", held_out, "c2", marked=True)], "step", "bits a byte"
        ),
        pairs("how far the chosen one is ahead", "reward_margin", "reward margin"),
        pairs("the chosen one ahead", "reward_accuracy", "share of pairs", zero=True),
        single("Learning rate", "learning rate", "learning_rate", "c3", ""),
        single("Speed", "speed", "tokens_per_second", "c4", "tokens a second"),
        single("Gradient norm", "gradient norm", "grad_norm", "c5", "before clipping"),
    ]


def model_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the model states of itself, as names and texts."""
    if not model:
        return []
    parameters, flops = mapping(model.get("parameters")), mapping(model.get("flops_per_token"))
    total, repeats = parameters.get("total"), model.get("layer_repeats")
    shape = (grouped(model.get(k)) for k in ("layers", "hidden_size", "intermediate_size"))
    heads = (grouped(model.get(k)) for k in ("num_attention_heads", "num_key_value_heads"))
    sizes = [
        f"{name} {fixed(ratio(size, 2**20), 1)} MiB"
        for name, size in mapping(model.get("memory_bytes")).items()
    ]
    return [
        ("parameters", grouped(total)),
        *(
            (f"- {name.replace('_', ' ')}", f"{grouped(number)} ({percent(ratio(number, total))})")
            for name, number in parameters.items()
            if number and name != "total"
        ),
        ("shape", "{} layers x {} wide, feed-forward {}".format(*shape)),
        ("heads", "{} query, {} key and value".format(*heads)),
        ("each block applied", "once" if repeats == 1 else f"{grouped(repeats)} times"),
        ("vocabulary", grouped(model.get("vocab_size"))),
        ("context", f"{grouped(model.get('max_position_embeddings'))} tokens"),
        (
            "training FLOPs a token",
            "{} (6N), {} with attention (PaLM's count)".format(
                count(flops.get("six_n"), 4), count(flops.get("palm"), 4)
            ),
        ),
        (
            "KV cache",
            f"{grouped(model.get('kv_cache_bytes_per_token'))} bytes a token in 16 bit",
        ),
        ("weights", ", ".join(sizes)),
    ]


def data_facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was trained on, as names and texts."""
    if not data:
        return []
    held_out, tokenizer = mapping(data.get("held_out")), mapping(data.get("tokenizer"))
    by_hash = held_out.get("rule") == "documents"
    rule = "documents chosen by hash" if by_hash else "the tail of the text"
    share = count(held_out.get("fraction"))
    return [
        *(
            (
                f"source {source.get('name')}",
                ", ".join(f"{grouped(source.get(key))} {key}" for key in SOURCE_COUNTS),
            )
            for source in tables(data.get("sources"))
        ),
        (
            "trained on",
            "{} tokens, {} bytes each".format(
                grouped(data.get("train_tokens")), fixed(data.get("bytes_per_token"), 2)
            ),
        ),
        ("held out", f"{grouped(data.get('held_out_tokens'))} tokens: {rule}, {share} of all"),
        (
            "tokenizer",
            f"{tokenizer.get('name')}, {grouped(tokenizer.get('vocab_size'))} tokens",
        ),
    ]
