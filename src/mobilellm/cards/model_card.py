"""The card of a Hugging Face folder: README.md with front matter, and what is known of the model.

    facts = facts_of(Path("runs/demo"), license="apache-2.0")
    (folder / "README.md").write_text(model_card(config, origin, facts))

The front matter is what the hub reads: license and base model where a user named them, library,
tags, and measured results. A run's own figures come from its result.json, scores of tasks from a
scores.json in the folder or its folder `scores`, as `eval --out` writes it. Nothing is claimed that
no file says. Names in the card are others' text: Markdown in them is shown and not obeyed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.files import read_json
from mobilellm.model.config import ModelConfig
from mobilellm.model.costs import ModelCosts
from mobilellm.printable import one_line

FILE = "README.md"
MAX_FACTS = 4 << 20  # bytes of a result.json or scores.json that are read
MAX_NAME = 200  # characters of one name
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
HUB_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
IN_TRANSFORMERS = ("llama", "qwen3", "cwm")
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$])")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says beside what the model's own files say."""

    name: str = ""
    """Of the model."""
    license: str | None = None
    """As the hub spells it; None leaves it out."""
    base_model: str | None = None
    """Name on the hub of the model that this one was made from."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """A run's result.json."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Metrics of tasks, by their names."""


def check_names(license: str | None, base_model: str | None) -> None:
    """`UserError` for a license or base model that the hub would not take."""
    if license is not None and not LICENSE.fullmatch(license):
        raise UserError(
            f"--license {license[:60]!r}: is spelled as on the hub, in small letters",
            hint="apache-2.0, mit, cc-by-4.0, llama3.2, other",
        )
    if base_model is not None and not HUB_NAME.fullmatch(base_model):
        raise UserError(
            f"--base-model {base_model[:60]!r}: is a name on the hub",
            hint="such as HuggingFaceTB/SmolLM2-135M",
        )


def facts_of(source: Path, license: str | None = None, base_model: str | None = None) -> CardFacts:
    """What lies beside the model at `source`, a run, a checkpoint of one, or another's model.

    A base model that is not given is the one that a folder's own config.json names.
    """
    checkpoint = source.parent.name == "checkpoints"
    run = source.parent.parent if checkpoint else source
    result = _object(run / "result.json")
    if checkpoint and result.get("checkpoint") != f"checkpoints/{source.name}":
        result = {}  # of a later checkpoint
    named = _object(source / "config.json").get("_name_or_path")
    if base_model is None and isinstance(named, str) and HUB_NAME.fullmatch(named):
        base_model = named
    return CardFacts(
        name=run.stem if run.is_file() else run.name,
        license=license,
        base_model=base_model,
        run=result,
        scores=_scores(run),
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        found = read_json(path, limit=MAX_FACTS) if path.is_file() else {}
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _scores(run: Path) -> dict[str, Any]:
    """Scores of tasks that were kept with the model: of it by name, or of the only one there."""
    for where in (run / "scores.json", run / "scores" / "scores.json"):
        models = _object(where)
        found = models.get(run.name, next(iter(models.values())) if len(models) == 1 else None)
        if isinstance(found, dict):
            return found
    return {}


def model_card(config: ModelConfig, origin: Mapping[str, Any], facts: CardFacts) -> str:
    """README.md: front matter and text."""
    body = [
        *_about(config, facts),
        *_use(config),
        *_origin(origin),
        *_training(facts.run),
        *_evaluation(facts),
    ]
    return "\n".join(["---", *_front_matter(config, facts), "---", "", *body]) + "\n"


# --- front matter ---


def _front_matter(config: ModelConfig, facts: CardFacts) -> list[str]:
    kind = config.to_dict()["model_type"]
    library = "transformers" if kind in IN_TRANSFORMERS else "mobilellm"
    values: dict[str, Any] = {
        "license": facts.license,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "base_model": facts.base_model,
        "tags": ["mobilellm", kind, "on-device"],
    }
    if results := _results(facts):
        values["model-index"] = [{"name": _name(facts.name or "model"), "results": results}]
    # JSON is YAML too, and quotes whatever a name may hold.
    return [f"{key}: {json.dumps(value)}" for key, value in values.items() if value]


def _results(facts: CardFacts) -> list[dict[str, Any]]:
    """The model index: what was measured, as the hub reads it."""
    found = []
    held_out = _table(facts.run.get("held_out"))
    metrics = [
        {"type": key, "name": name, "value": held_out[key]}
        for key, name in (
            ("perplexity", "perplexity a token"),
            ("bits_per_byte", "bits a byte"),
            ("loss", "loss, nats a token"),
        )
        if _is_number(held_out.get(key))
    ]
    if metrics:
        sources = ", ".join(name for name, *_ in _sources(facts.run))
        dataset = {"name": f"held-out part of {sources or 'the data'}", "type": "held-out"}
        found.append(_result(dataset, metrics))
    for task, row in _tasks(facts):
        metrics = [
            {"type": key, "name": key, "value": row[key]}
            for key in ("acc", "acc_norm", "word_perplexity", "bits_per_byte")
            if _is_number(row.get(key))
        ]
        if metrics:
            dataset = {"name": task, "type": task}
            if isinstance(split := row.get("split"), str):
                dataset["split"] = _name(split)
            found.append(_result(dataset, metrics))
    return found


def _result(dataset: dict[str, str], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    task = {"type": "text-generation", "name": "Text generation"}
    return {"task": task, "dataset": dataset, "metrics": metrics}


# --- text ---


def _about(config: ModelConfig, facts: CardFacts) -> list[str]:
    costs = ModelCosts.of(config)
    blocks = f"{config.num_hidden_layers} x {config.hidden_size}"
    if config.layer_repeats > 1:
        blocks += f", each applied {config.layer_repeats} times ({config.layer_order})"
    tied = "tied" if config.tie_word_embeddings else "untied"
    heads = f"{config.num_attention_heads}, {config.num_key_value_heads} of keys and values"
    kinds = {"swiglu": "SwiGLU", "relu": "ReLU"}
    rows = [
        ("parameters", f"{costs.parameters['total']:,}"),
        ("layers", blocks),
        ("feed-forward", f"{config.intermediate_size}, {kinds[config.feed_forward]}"),
        ("heads", f"{heads}" + (", normalized queries and keys" if config.qk_norm else "")),
        ("vocabulary", f"{config.vocab_size:,} tokens, {tied}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
    ]
    if config.layer_types is not None:
        count = sum(spec.window is not None for spec in config.attention_specs)
        rows.append(("sliding window", f"{config.sliding_window} tokens in {count} layers"))
    return [f"# {_text(facts.name or 'Model')}", "", *_grid(("", ""), rows)]


def _use(config: ModelConfig) -> list[str]:
    ours = ["```python", "import mobilellm", "", 'model = mobilellm.load("FOLDER")']
    ours += ['print(model.generate("Once", max_new_tokens=50))', "```", ""]
    if config.to_dict()["model_type"] not in IN_TRANSFORMERS:
        return ["## Use", "", *ours]
    theirs = [
        "```python",
        "from transformers import pipeline",
        "",
        'write = pipeline("text-generation", model="FOLDER")',
        'print(write("Once", max_new_tokens=50)[0]["generated_text"])',
        "```",
        "",
    ]
    return ["## Use", "", *theirs]


def _origin(origin: Mapping[str, Any]) -> list[str]:
    """Where the weights come from, as far as their files say."""
    rows = [
        (what, str(origin[key]))
        for key, what in (
            ("made_by", "made by"),
            ("source", "converted from"),
            ("source_sha256", "its SHA-256"),
            ("run", "run"),
            ("step", "step"),
            ("preset", "preset"),
            ("started_from", "weights at the start"),
            ("data_fingerprint", "data"),
        )
        if isinstance(origin.get(key), (str, int)) and origin[key] != ""
    ]
    before = origin.get("came_from")
    found = ["## Origin", "", *_grid(("", ""), rows)] if rows else []
    if isinstance(before, Mapping) and (earlier := _origin(before)):
        found += ["Before that:", "", *earlier[2:]]
    return found


def _training(run: Mapping[str, Any]) -> list[str]:
    training, data = _table(run.get("training")), _table(run.get("data"))
    rows = [
        (what, f"{training[key]:,}{unit}")
        for key, what, unit in (
            ("steps", "steps", ""),
            ("tokens", "tokens", ""),
            ("seconds", "time", " s"),
            ("tokens_per_second", "speed", " tokens a second"),
        )
        if _is_number(training.get(key))
    ]
    tokenizer = _table(data.get("tokenizer")).get("name")
    if isinstance(tokenizer, str):
        rows.append(("tokenizer", tokenizer))
    if not rows:
        return []
    text = ["## Training", "", *_grid(("", ""), rows)]
    if sources := _sources(run):
        numbers = [(name, *(f"{n:,}" for n in counts)) for name, *counts in sources]
        text += _grid(("source", "documents", "tokens", "bytes"), numbers)
    return text


def _evaluation(facts: CardFacts) -> list[str]:
    held_out = _table(facts.run.get("held_out"))
    rows = [
        (f"held-out {name}", f"{held_out[key]:.4g}")
        for key, name in (("loss", "loss (nats a token)"), ("bits_per_byte", "bits a byte"))
        if _is_number(held_out.get(key))
    ]
    for task, row in _tasks(facts):
        for key in ("acc", "acc_norm"):
            if _is_number(row.get(key)):
                error: Any = row.get(f"{key}_stderr")
                about = f" ± {100 * error:.2f}" if _is_number(error) else ""
                count = f", {row['count']:,} items" if _is_number(row.get("count")) else ""
                rows.append((f"{task} ({key})", f"{100 * row[key]:.2f} %{about}{count}"))
    return ["## Evaluation", "", *_grid(("", ""), rows)] if rows else []


# --- others' values ---


def _sources(run: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    """Name, documents, tokens and bytes of each source of the data."""
    listed = _table(run.get("data")).get("sources")
    found = []
    for source in listed if isinstance(listed, list) else []:
        counts = [_table(source).get(key) for key in ("documents", "tokens", "bytes")]
        if all(type(n) is int for n in counts):
            found.append((_name(str(source.get("name"))), *counts))
    return found  # type: ignore[return-value]


def _tasks(facts: CardFacts) -> list[tuple[str, Mapping[str, Any]]]:
    return [(_name(task), _table(row)) for task, row in facts.scores.items()]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value and abs(value) != float("inf")


def _name(text: str) -> str:
    """Others' text as one line of printable characters."""
    return one_line(text, MAX_NAME).strip()


def _text(text: str) -> str:
    """The same as Markdown that shows it as it is."""
    return MARKUP.sub(r"\\\1", _name(text))


def _grid(head: tuple[str, ...], rows: list[Any]) -> list[str]:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]
