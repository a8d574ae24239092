"""Speed and memory of one training step against transformers' LlamaForCausalLM of the same shape.

    python benchmarks/train_step.py         # the demo's size, then 125M at 2 x 512 tokens
    python benchmarks/train_step.py --only demo --rounds 3

The peer is LlamaForCausalLM with torch's AdamW, eager, fp32, as its own documentation trains it.
Ours runs as `mobilellm train` would resolve it here, and once more in fp32 so that precision and
engineering can be told apart. Both are stepped in turn in one process; memory is the peak of a
process of its own for each. Prints a table; --save adds the JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {
    # name: preset, vocabulary, sequences, sequence length, steps timed a round
    "demo": ("5M", 1024, 8, 256, 8),
    "125M": ("125M", 32000, 2, 512, 1),
}


def stepper(
    kind: str, size: str, precision: str, compiled: bool, optimizer_kind: str = "adamw"
) -> Callable[[], float]:
    """A function that makes one training step and returns its loss."""
    import torch

    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.model.precision import Precision
    from mobilellm.optimizers.optimizer import build
    from mobilellm.recipe.recipe import OptimizerSection

    preset, vocabulary, sequences, length, _ = SIZES[size]
    config = ModelConfig.preset(preset, vocab_size=vocabulary)
    torch.manual_seed(0)
    ids = torch.randint(0, vocabulary, (sequences, length + 1))
    if kind == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        keys = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
        )
        model = LlamaForCausalLM(LlamaConfig(**{key: getattr(config, key) for key in keys}))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )

        def step() -> float:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step
    network = Network(config)
    optimizers = build(
        network, OptimizerSection(name=optimizer_kind, learning_rate=1e-3), Precision(precision)
    )  # type: ignore[arg-type]
    if compiled:
        for layer in network.layers:
            layer.compile(dynamic=False)

    def our_step() -> float:
        with Precision(precision).autocast(ids.device):
            loss = network.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad(set_to_none=True)
        return loss.item()

    return our_step


def peak_memory(arguments: tuple[Any, ...]) -> int:
    """Peak resident bytes that two steps add to a process, over what it held before the network was
    built."""
    import torch._dynamo  # noqa: F401

    import mobilellm.evaluate.perplexity
    import mobilellm.optimizers.optimizer  # noqa: F401  (what is imported is no part of a step)

    if arguments[0] == "transformers":
        from transformers import LlamaForCausalLM  # noqa: F401
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak starts anew (a child inherits its parent's)
    before = _status("VmRSS")
    step = stepper(*arguments)
    step()
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(size: str, rounds: int) -> dict[str, Any]:
    """Seconds a step, interleaved: every round steps each contestant in turn."""
    import torch

    from mobilellm.hardware.probes import compiler_works
    from mobilellm.model.precision import Precision

    precision, compiled = Precision.fast_on(torch.device("cpu")), compiler_works()
    contestants = {"transformers, eager fp32": ("transformers", size, "fp32", False)}
    contestants["ours, eager fp32"] = ("ours", size, "fp32", False)
    if compiled:
        contestants["ours, compiled fp32"] = ("ours", size, "fp32", True)
    if precision is Precision.BF16:
        contestants["ours, as resolved here"] = ("ours", size, "bf16", compiled)
        if size == "demo":
            contestants["ours, as resolved, Muon"] = ("ours", size, "bf16", compiled, "muon")
    steps = {name: stepper(*arguments) for name, arguments in contestants.items()}
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(SIZES[size][4]):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    del steps
    _, _, sequences, length, _ = SIZES[size]
    tokens = sequences * length
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, arguments in contestants.items():
            memory = pool.apply(peak_memory, (arguments,))
            middle = statistics.median(seconds[name])
            rows.append(
                {
                    "name": name,
                    "seconds": middle,
                    "tokens_per_second": tokens / middle,
                    "peak_bytes": memory,
                }
            )
    peer = rows[0]
    for row in rows:
        row["speed_ratio"] = row["tokens_per_second"] / peer["tokens_per_second"]
        row["memory_ratio"] = row["peak_bytes"] / peer["peak_bytes"]
    return {
        "size": size,
        "sequences": sequences,
        "sequence_length": length,
        "rounds": rounds,
        "rows": rows,
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SIZES), help="one size")
    parser.add_argument("--rounds", type=int, default=5, help="times each contestant has its turn")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    import torch
    import transformers

    from mobilellm.hardware.description import describe

    machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
    results = []
    print(
        f"{machine['device']}, {torch.get_num_threads()} threads, {machine['cpu_capability']}, "
        f"torch {torch.__version__}"
    )
    for size in [arguments.only] if arguments.only else SIZES:
        result = measure(size, arguments.rounds)
        results.append(result)
        print(
            f"\n{size}: {result['sequences']} x {result['sequence_length']} tokens a step, median "
            f"of {arguments.rounds} rounds"
        )
        print(f"{'':28}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}")
        for row in result["rows"]:
            print(
                f"{row['name']:28}{row['tokens_per_second']:>10,.0f}{row['speed_ratio']:>8.2f}"
                f"{row['peak_bytes'] / 2**20:>10,.0f}{row['memory_ratio']:>8.2f}"
            )
    if arguments.save:
        record = {
            "benchmark": "train_step",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "platform": platform.platform(),
            "transformers": transformers.__version__,
            "results": results,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
