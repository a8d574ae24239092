"""Quantization-aware training of a model for a fixed time: what comes back of what rounding loses.

    python benchmarks/qat.py --model MODEL --text wikipedia.jsonl.gz --wikitext wiki.test.raw \\
        --work FOLDER --minutes 10 --save benchmarks/results/qat.json

Perplexity of one text, in one run: the model as it is, its blocks rounded to int4 by each rule, and
after training for the grid, from the text alone and from the model itself as the teacher. Both
trainings have the same steps on the same data; `--minutes` is the plain one's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch

from mobilellm.evaluate.held_out import score_text
from mobilellm.hardware.description import describe
from mobilellm.interop.load import load
from mobilellm.model.precision import Precision
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.quantize.methods import quantized_as_trained, quantized_network
from mobilellm.recipe.recipe import Recipe
from mobilellm.train.start import train

CONTEXT = 2048
TIMED_STEPS = 4  # steps of the run that finds out how long one takes


def perplexity(
    model: Path, text: Path, tokens: int, method: str = "", scheme: str = "int4"
) -> float:
    """Perplexity of the model's float weights, or of these rounded by `method`; "trained" rounds
    them as its training did."""
    loaded = load(model)
    if method == "trained":
        assert quantized_as_trained(loaded.network, loaded.origin) is not None
    elif method:
        quantized_network(loaded.network, scheme, method)
    precision = Precision.fast_on(torch.device("cpu"))
    score = score_text(
        loaded.network,
        loaded.require_tokenizer(),
        text,
        sequence_length=CONTEXT,
        precision=precision,
        max_tokens=tokens,
    )
    return round(score.perplexity, 3)


def recipe(arguments: argparse.Namespace, data: Path, steps: int, **sections: Any) -> Recipe:
    """A run from the model on the data."""
    return Recipe.from_dict(
        {
            "start": {"from": str(arguments.model)},
            "data": {"path": str(data), "sequence_length": arguments.length},
            "train": {
                "steps": steps,
                "batch_tokens": arguments.batch_tokens,
                "micro_batch_size": arguments.batch_tokens // arguments.length,
                "evaluate_every": 0,
                "checkpoint_every": 10**6,
                "log_every": 10,
                "compile": arguments.compile,
            },
            "optimizer": {
                "learning_rate": arguments.learning_rate,
                "weight_decay": 0.0,
                "warmup_steps": max(1, steps // 20),
                "schedule": "linear",
                "final_lr_fraction": 0.0,
            },
        }
        | sections
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every row of the table."""
    work: Path = arguments.work
    data = work / "data"
    if not data.exists():
        tokenizer = load(arguments.model).require_tokenizer()
        prepare([Source("text", [arguments.text])], data, tokenizer=tokenizer, held_out=0.001)
    scheme = {"quantize": {"scheme": "int4"}}
    begun = time.perf_counter()
    train(work / f"timed-{time.time_ns()}", recipe(arguments, data, TIMED_STEPS, **scheme))
    per_step = (time.perf_counter() - begun) / TIMED_STEPS
    steps = max(TIMED_STEPS, int(arguments.minutes * 60 / per_step))
    rows: dict[str, Any] = {
        "float": perplexity(arguments.model, arguments.wikitext, arguments.tokens)
    }
    for method in ("round", "search"):
        rows[method] = perplexity(arguments.model, arguments.wikitext, arguments.tokens, method)
    for name, sections in (
        ("trained", scheme),
        ("trained, itself as teacher", scheme | {"distill": {"teacher": "start", "weight": 1.0}}),
    ):
        out = work / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}"
        begun = time.perf_counter()
        train(out, recipe(arguments, data, steps, **sections))
        rows[name] = perplexity(out, arguments.wikitext, arguments.tokens, "trained")
        rows[f"{name}: seconds"] = round(time.perf_counter() - begun, 1)
    lost = rows["round"] - rows["float"]
    back = {
        name: round((rows["round"] - rows[name]) / lost, 3)
        for name in ("search", "trained", "trained, itself as teacher")
    }
    return {
        "perplexity": rows,
        "share_of_the_loss_that_came_back": back,
        "steps": steps,
        "tokens_trained": steps * arguments.batch_tokens,
        "tokens_scored": arguments.tokens,
        "settings": {k: str(v) for k, v in vars(arguments).items() if k not in ("work", "save")},
        "environment": describe(torch.device("cpu")),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Read the command line, print the result, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="what is trained on")
    parser.add_argument("--wikitext", type=Path, required=True, help="what is scored")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=40_960, help="of the scored text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--compile", default="off")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    result = run(arguments)
    print(json.dumps(result, indent=2))
    if arguments.save:
        arguments.save.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
