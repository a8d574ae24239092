"""The end of a run: final figures, baselines, samples and the report, written beside its
metrics."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, cast

from mobilellm.data.dataset import Data
from mobilellm.data.token_folder import TokenFolder
from mobilellm.evaluate.baselines import baselines
from mobilellm.evaluate.held_out import held_out
from mobilellm.files import read_json, write_json
from mobilellm.interop.load import load
from mobilellm.interop.loaded import Loaded
from mobilellm.model.costs import ModelCosts
from mobilellm.model.generation import Sampling
from mobilellm.model.precision import Precision
from mobilellm.records import (
    DataFigures,
    HeldOut,
    Result,
    Sample,
    SourceFigures,
    Training,
)
from mobilellm.report.run_files import read_metrics
from mobilellm.report.run_page import write_report
from mobilellm.train.inputs import open_data
from mobilellm.train.loop import Outcome
from mobilellm.train.run_folder import now, read_recipe
from mobilellm.workflows.conversation_samples import conversation_samples
from mobilellm.workflows.teacher_flops import teacher_flops

SAMPLE_TOKENS = 160
BASELINE_BYTES = 4 << 20  # of text that is decoded for the compressors


def finish(outcome: Outcome, known: dict[str, Any] | None = None, sampled: bool = True) -> Result:
    """Write result.json and report.html of a run that reached its last step; returns the result.

    `known` are baselines computed before on the same data; without `sampled` no texts are drawn.
    """
    run, recipe = outcome.run, read_recipe(outcome.run)
    data = open_data(recipe)
    loaded = load(outcome.checkpoint)
    assert loaded.tokenizer is not None  # the loop saves one with every checkpoint
    score = outcome.held_out or held_out(
        loaded.network,
        data,
        sequence_length=recipe.data.sequence_length,
        precision=Precision(recipe.train.precision),
    )
    masked = data.masked
    prompts = [] if masked else _prompts(data, loaded)
    numbers, config = ModelCosts.of(loaded.config), loaded.config
    result: Result = {
        "name": run.name,
        "finished": now(),
        "checkpoint": str(outcome.checkpoint.relative_to(run)),
        "held_out": cast("HeldOut", dataclasses.asdict(score)),
        "baselines": {} if masked else _baselines(data, loaded) if known is None else known,
        "samples": samples(loaded, prompts) if sampled else [],
        "training": cast(
            "Training", {**_training(run, outcome), **teacher_flops(recipe, outcome.tokens)}
        ),
        "model": {
            "preset": recipe.model.preset,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "layer_repeats": config.layer_repeats,
            "parameters": numbers.parameters,
            "memory_bytes": numbers.memory_bytes(),
            "flops_per_token": numbers.flops_per_token(recipe.data.sequence_length),
            "kv_cache_bytes_per_token": numbers.kv_cache_bytes_per_token(),
        },
        "data": _data(data),
        "next": [
            {"what": "Talk with it", "command": f"mobilellm chat {run}"}
            if masked
            else {
                "what": "Generate text",
                "command": f"mobilellm generate {run} --prompt {shlex.quote(prompts[-1])}",
            },
            {"what": "Score another text", "command": f"mobilellm eval {run} --text FILE"},
            {
                "what": "Train on your own text",
                "command": "mobilellm quickstart --text FILE --out runs/mine",
            },
            {
                "what": "Take it to llama.cpp",
                "command": f"mobilellm convert {run} model.gguf --to gguf",
            },
        ],
    }
    before = read_json(run / "environment.json").get("started_from")
    if before:
        result["held_out_before"] = before["held_out"]
    if isinstance(data, TokenFolder) and masked:
        base = Path(recipe.start.from_) if recipe.start.from_ else None
        result["conversations"] = conversation_samples(data, loaded, base)
    write_json(run / "result.json", result)
    write_report(run)
    return result


def _data(data: Data) -> DataFigures:
    """What the report says of the data; nothing for the original's layout, which has no
    manifest."""
    if not isinstance(data, TokenFolder):
        return {}
    manifest = data.manifest
    train_split = manifest["splits"]["train"]
    return {
        "sources": [
            SourceFigures(
                name=s["name"], documents=s["documents"], tokens=s["tokens"], bytes=s["bytes"]
            )
            for s in manifest["sources"]
        ],
        "tokenizer": {k: manifest["tokenizer"][k] for k in ("name", "vocab_size")},
        "train_tokens": train_split["tokens"],
        "held_out_tokens": manifest["splits"]["held_out"]["tokens"],
        "bytes_per_token": train_split["bytes"] / max(1, train_split["tokens"]),
        "scored": "held-out answers" if data.masked else "held-out text",
        "held_out": manifest["held_out"],
    }


def samples(loaded: Loaded, prompts: list[str]) -> list[Sample]:
    """A continuation of each prompt."""
    found: list[Sample] = []
    for seed, prompt in enumerate(prompts):
        sampling = Sampling(temperature=0.8, top_k=0, top_p=0.95, seed=seed)
        ids = loaded.prompt_ids(prompt)
        room = loaded.config.max_position_embeddings - len(ids)
        tokens = list(loaded.network.generate(ids, min(SAMPLE_TOKENS, room), sampling))
        found.append(
            {
                "prompt": prompt,
                "text": loaded.continuation(ids, tokens),
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "seed": seed,
            }
        )
    return found


def _prompts(data: Data, loaded: Loaded) -> list[str]:
    """Nothing, and the beginnings of two places of the held-out text: it was never trained on."""
    assert loaded.tokenizer is not None
    stream = data.tokens("held_out")
    openings = []
    for start in (0, len(stream) // 2):
        text = loaded.tokenizer.decode(
            [int(t) for t in stream.read(start, min(200, len(stream) - start))]
        )
        # The first line may be the end of one: take the next that has a word in it.
        lines = [line for line in text.splitlines()[1:] or [text] if re.search(r"\w{3}", line)]
        openings += [" ".join(line.split()[:8]) for line in lines[:1]]
    return ["", *openings]


def _baselines(data: Data, loaded: Loaded) -> dict[str, Any]:
    assert loaded.tokenizer is not None
    train, held_out = data.tokens("train"), data.tokens("held_out")

    def text(stream: Any) -> str:
        assert loaded.tokenizer is not None
        tokens, pieces, count = stream.read(0, min(len(stream), BASELINE_BYTES)), [], 0
        for start in range(0, len(tokens), 1 << 16):
            pieces.append(loaded.tokenizer.decode(tokens[start : start + (1 << 16)].tolist()))
            count += len(pieces[-1])
            if count >= BASELINE_BYTES:
                break
        return "".join(pieces)

    return baselines(
        train,
        held_out,
        data.text_bytes("held_out"),
        loaded.config.vocab_size,
        text(train),
        text(held_out),
    )


def _training(run: Path, outcome: Outcome) -> Training:
    """Totals over every process that trained this run, from its metrics."""
    tokens = seconds = 0.0
    before = 0
    for row in read_metrics(run / "metrics.jsonl")[0]:
        if row.get("tokens") and row.get("tokens_per_second"):
            seconds += (row["tokens"] - before) / row["tokens_per_second"]
            tokens, before = row["tokens"], row["tokens"]
    return {
        "steps": outcome.step,
        "tokens": outcome.tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
    }
