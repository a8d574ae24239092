"""report.html: what a run did, on one page that needs no network.

    write_report(Path("runs/demo"))      # -> runs/demo/report.html

Written for finished runs and for interrupted ones alike; what is not there yet is left out. All text in it is escaped: the
samples are whatever the model produced.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from mobilellm.files import read_json, write_file
from mobilellm.report.chart import Line, bar_chart, line_chart, smooth
from mobilellm.report.style import SCRIPT, STYLE

BASELINES = {
    "unigram": "unigram (token frequencies)",
    "gzip": "gzip -9",
    "xz": "xz -9e",
    "xz_after_train": "xz -9e, primed with the training text",
}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and how many lines could not be read (a kill cuts off the last one)."""
    rows, broken = [], 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                try:
                    rows.append(orjson.loads(line))
                except orjson.JSONDecodeError:
                    broken += 1
    return rows, broken


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path."""
    rows, broken = read_metrics(run / "metrics.jsonl")
    result = read_json(run / "result.json") if (run / "result.json").is_file() else {}
    environment = (
        read_json(run / "environment.json") if (run / "environment.json").is_file() else {}
    )
    recipe = (
        (run / "recipe.toml").read_text(encoding="utf-8") if (run / "recipe.toml").is_file() else ""
    )
    name = str(result.get("name", run.name))
    sections = [
        _tiles(result, rows),
        _section("Against simpler predictors", _baselines(result)),
        _section(
            "Training",
            _curves(rows)
            + (f"<p>{broken} line of the metrics could not be read.</p>" if broken else ""),
        ),
        _section("Samples", _samples(result.get("samples", []))),
        _section("The model's own numbers", _model(result.get("model", {}))),
        _section("Data", _data(result.get("data", {}))),
        _section("How to go on", _next(result.get("next", []))),
        _details("Recipe, as resolved", f"<pre>{html.escape(recipe)}</pre>" if recipe else ""),
        _details("Environment", _table((k, _plain(v)) for k, v in environment.items())),
    ]
    status = f"finished {result['finished']}" if "finished" in result else "not finished"
    path = run / "report.html"
    write_file(path, _page(name, "mobilellm run", status, "".join(sections)).encode())
    return path


def _page(name: str, kind: str, status: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} - mobilellm</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>{html.escape(kind)}</p><h1>{html.escape(name)}</h1><p>{html.escape(status)}</p></header>"
        f"{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """One page with the curves of several runs on the same axes, and what differs between their recipes."""
    named = {
        run.name if sum(r.name == run.name for r in runs) == 1 else str(run): run for run in runs
    }
    rows = {name: read_metrics(run / "metrics.jsonl")[0] for name, run in named.items()}
    results = {
        name: read_json(run / "result.json") if (run / "result.json").is_file() else {}
        for name, run in named.items()
    }

    def lines(key: str, smoothed: bool = False, over: str = "tokens") -> list[Line]:
        found = []
        for number, (name, own) in enumerate(rows.items()):
            points = [
                (row[over], row[key]) for row in own if isinstance(row.get(key), (int, float))
            ]
            curve = smooth(points, max(1, len(points) // 50)) if smoothed else points
            found.append(
                Line(name, curve, f"c{number % 5 + 1}", marked=not smoothed and len(points) < 60)
            )
        return found

    charts = [
        line_chart(
            "Training loss, smoothed", lines("loss", smoothed=True), "tokens", "nats a token"
        ),
        line_chart("Held-out", lines("held_out_bits_per_byte"), "tokens", "bits a byte"),
        line_chart(
            "Held-out over time",
            lines("held_out_bits_per_byte", over="seconds"),
            "seconds of training",
            "bits a byte",
        ),
        line_chart("Learning rate", lines("learning_rate"), "tokens", "", zero=True),
        line_chart(
            "Gradient norm, smoothed",
            lines("grad_norm", smoothed=True),
            "tokens",
            "before clipping",
            zero=True,
        ),
        line_chart("Speed", lines("tokens_per_second"), "tokens", "tokens a second", zero=True),
    ]
    finals = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _final(own, results[name]))
        + "</tr>"
        for name, own in rows.items()
    )
    header = "<tr><th>run</th><td>steps</td><td>tokens</td><td>last loss</td><td>held-out bits a byte</td><td>tokens/s</td></tr>"
    body = (
        _section("Final figures", f"<table>{header}{finals}</table>")
        + _section("Curves", f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "")
        + _section("What differs between the recipes", _differences(named))
    )
    write_file(
        path, _page(f"{len(named)} runs", "mobilellm comparison", ", ".join(named), body).encode()
    )
    return path


def _final(rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[str]:
    last: dict[str, Any] = rows[-1] if rows else {}
    scored = [
        row["held_out_bits_per_byte"]
        for row in rows
        if isinstance(row.get("held_out_bits_per_byte"), (int, float))
    ]
    held_out = result.get("held_out", {}).get("bits_per_byte", scored[-1] if scored else None)
    speed = result.get("training", {}).get("tokens_per_second", last.get("tokens_per_second"))
    return [
        f"{last.get('step', 0):,}", _big(last.get("tokens", 0)), f"{last['loss']:.4f}" if last.get("loss") is not None else "-",
        "-" if held_out is None else f"{held_out:.4f}", "-" if speed is None else f"{speed:,.0f}",
    ]  # fmt: skip


def _differences(runs: dict[str, Path]) -> str:
    recipes = {
        name: (run / "recipe.toml").read_text("utf-8") if (run / "recipe.toml").is_file() else ""
        for name, run in runs.items()
    }
    settings: dict[str, dict[str, str]] = {}
    for name, text in recipes.items():
        section = ""
        for line in text.splitlines():
            if line.startswith("["):
                section = line.strip("[]") + "."
            elif " = " in line:
                key, value = line.split(" = ", 1)
                settings.setdefault(section + key, {})[name] = value
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th>"
        + "".join(f"<td>{html.escape(values.get(name, '-'))}</td>" for name in runs)
        + "</tr>"
        for key, values in settings.items()
        if len({values.get(name) for name in runs}) > 1
    )
    header = "<tr><th></th>" + "".join(f"<td>{html.escape(name)}</td>" for name in runs) + "</tr>"
    return f"<table>{header}{rows}</table>" if rows else "<p>nothing</p>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>" if body else ""


def _plain(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, list)
        else "none"
        if value is None
        else str(value)
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>" if cells else ""


def _tiles(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    held_out, training, model = (result.get(key, {}) for key in ("held_out", "training", "model"))
    last = rows[-1] if rows else {}
    tiles: list[tuple[str, str, str]] = []
    if held_out:
        tiles += [
            (f"{held_out['bits_per_byte']:.3f}", "bits a byte", "held-out text"),
            (
                f"{held_out['perplexity']:.2f}",
                "perplexity",
                f"a token, over {held_out['tokens']:,}",
            ),
        ]
    if model:
        tiles.append(
            (
                _big(model["parameters"]["total"]),
                "parameters",
                f"{model['layers']} layers, {model['hidden_size']} wide",
            )
        )
    tokens, speed = (
        training.get("tokens", last.get("tokens")),
        training.get("tokens_per_second", last.get("tokens_per_second")),
    )
    if tokens:
        tiles.append(
            (
                _big(tokens),
                "tokens trained on",
                f"in {training.get('steps', last.get('step')):,} steps",
            )
        )
    if speed:
        tiles.append(
            (
                f"{speed:,.0f}",
                "tokens a second",
                f"{training['seconds'] / 60:.1f} minutes" if "seconds" in training else "",
            )
        )
    cells = "".join(
        f"<div><strong>{html.escape(figure)}</strong><span>{html.escape(what)}</span><small>{html.escape(more)}</small></div>"
        for figure, what, more in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _big(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}".rstrip("0").rstrip(".") + letter
    return f"{number:g}"


def _baselines(result: dict[str, Any]) -> str:
    held_out, others = result.get("held_out"), result.get("baselines")
    if not held_out or not others:
        return ""
    rows = [(text, float(others[key]), False) for key, text in BASELINES.items() if key in others]
    rows.append(("this model", float(held_out["bits_per_byte"]), True))
    rows.sort(key=lambda row: -row[1])
    return bar_chart(
        rows,
        f"Bits a byte on the same held-out text ({held_out['bytes']:,} bytes); lower is better",
    )


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]

    loss = points("loss")
    charts = [
        line_chart(
            "Loss",
            [
                Line("each step", loss, "c1", faint=True),
                Line("training, smoothed", smooth(loss, max(1, len(loss) // 50)), "c1"),
                Line("held-out", points("held_out_loss"), "c2", marked=True),
            ],
            "step",
            "nats a token",
        ),
        line_chart(
            "Held-out",
            [Line("held-out", points("held_out_bits_per_byte"), "c2", marked=True)],
            "step",
            "bits a byte",
        ),
        line_chart(
            "Learning rate",
            [Line("learning rate", points("learning_rate"), "c3")],
            "step",
            "",
            zero=True,
        ),
        line_chart(
            "Speed",
            [Line("speed", points("tokens_per_second"), "c4")],
            "step",
            "tokens a second",
            zero=True,
        ),
        line_chart(
            "Gradient norm",
            [Line("gradient norm", points("grad_norm"), "c5")],
            "step",
            "before clipping",
            zero=True,
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    return "".join(
        f'<figure class="sample"><blockquote><b>{html.escape(sample["prompt"])}</b>{html.escape(sample["text"])}</blockquote>'
        f"<figcaption>temperature {sample.get('temperature')}, top-p {sample.get('top_p')}, seed {sample.get('seed')}"
        f"{'' if sample['prompt'] else ', no prompt'}</figcaption></figure>"
        for sample in samples
    )


def _model(model: dict[str, Any]) -> str:
    if not model:
        return ""
    parameters, flops = model["parameters"], model["flops_per_token"]
    rows = [("parameters", f"{parameters['total']:,}")]
    rows += [
        (f"- {name.replace('_', ' ')}", f"{number:,} ({number / parameters['total']:.1%})")
        for name, number in parameters.items()
        if number and name != "total"
    ]
    heads = f"{model['num_attention_heads']} query, {model['num_key_value_heads']} key and value"
    rows += [
        (
            "shape",
            f"{model['layers']} layers x {model['hidden_size']} wide, feed-forward {model['intermediate_size']}",
        ),
        ("heads", heads),
        (
            "each block applied",
            f"{model['layer_repeats']} times" if model["layer_repeats"] > 1 else "once",
        ),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("context", f"{model['max_position_embeddings']:,} tokens"),
        (
            "training FLOPs a token",
            f"{_big(flops['six_n'])} (6N), {_big(flops['palm'])} with attention (PaLM's count)",
        ),
        ("KV cache", f"{model['kv_cache_bytes_per_token']:,} bytes a token in 16 bit"),
        (
            "weights",
            ", ".join(
                f"{name} {size / 2**20:.1f} MiB" for name, size in model["memory_bytes"].items()
            ),
        ),
    ]
    return _table(rows)


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    rule = (
        "documents chosen by hash"
        if data["held_out"]["rule"] == "documents"
        else "the tail of the text"
    )
    rows = [
        (
            f"source {source['name']}",
            f"{source['documents']:,} documents, {source['tokens']:,} tokens, {source['bytes']:,} bytes",
        )
        for source in data["sources"]
    ]
    rows += [
        (
            "trained on",
            f"{data['train_tokens']:,} tokens, {data['bytes_per_token']:.2f} bytes each",
        ),
        (
            "held out",
            f"{data['held_out_tokens']:,} tokens: {rule}, {data['held_out']['fraction']:.3g} of all",
        ),
        ("tokenizer", f"{data['tokenizer']['name']}, {data['tokenizer']['vocab_size']:,} tokens"),
    ]
    return _table(rows)


def _next(steps: Sequence[dict[str, str]]) -> str:
    return "".join(
        f"<p>{html.escape(s['what'])}</p><pre>{html.escape(s['command'])}</pre>" for s in steps
    )
