"""Training against Hugging Face's Trainer: the same weights, the same batches, the same precision,
step by step in turn.

    pip install accelerate                                  # which the Trainer asks for
    python benchmarks/trainer_vs_hf.py   # fp32 and what the device is fast at
    python benchmarks/trainer_vs_hf.py --only demo --save benchmarks/results/trainer_vs_hf.json

Each contestant trains in a process of its own: transformers.Trainer on LlamaForCausalLM as its
documentation has it (fused AdamW, eager), and `mobilellm train`'s loop as it resolves its settings
here. They take turns: while one makes a step the other waits, so what else the machine does meets
both. Speed is the median step after the third, and the ratio the median of the ratios of
neighbouring steps, of wall clock and of processor time: with --threads 1 the latter hardly depends
on what else the machine does. Memory is the peak of resident memory over what was held before the
model was built, without the last checkpoint, which the Trainer is told not to write. The losses of
all steps are compared.

The bound is the time of a step's matrix products alone, each of its shapes at the fastest that this
machine was seen to multiply it; the share is that time over ours.

    python benchmarks/trainer_vs_hf.py --only demo --against compile=off products=torch

measures ours against ours with these settings of [train] instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {
    # name: preset, vocabulary, sequence length, sequences a step, steps
    "demo": ("5M", 1024, 256, 8, 24),
    "125M": ("125M", 32000, 2048, 1, 10),
    "smoke": ("1M", 1024, 64, 2, 6),
}
if steps := os.environ.get("BENCHMARK_STEPS"):  # a contestant's, as --steps has it
    SIZES = {name: (*size[:4], int(steps)) for name, size in SIZES.items()}
LEARNING_RATE = 1e-3


TURN = [0.0]


def turn() -> None:
    """Wait for this process's turn; the first time, say that it is set up."""
    if not TURN[0]:
        print("READY", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark ended")
    TURN[0] = time.process_time()


def done(seconds: float) -> None:
    """End of this process's turn."""
    print(f"STEP{seconds} {time.process_time() - TURN[0]}", flush=True)


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def settings(folder: Path, size: str, precision: str) -> Any:
    """The recipe that both follow."""
    from mobilellm.recipe.recipe import (
        DataSection,
        ModelSection,
        OptimizerSection,
        Recipe,
        TrainSection,
    )

    _, _, length, rows, steps = SIZES[size]
    return Recipe(
        model=ModelSection(preset=str(folder / "start/config.json")),
        data=DataSection(path=str(folder / "data"), sequence_length=length),
        train=TrainSection(
            steps=steps,
            batch_tokens=length * rows,
            micro_batch_size=rows,
            precision=precision,
            evaluate_every=0,
            log_every=1,  # type: ignore[arg-type]
            checkpoint_every=10**6,
            compile="auto",
        ),
        optimizer=OptimizerSection(
            learning_rate=LEARNING_RATE, warmup_steps=0, schedule="constant"
        ),
    )


def set_up(folder: Path, size: str) -> None:
    """Data of the sample text, and first weights, on disk."""
    import gzip

    import torch

    import mobilellm
    from mobilellm.interop.folder import save_checkpoint
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source

    preset, vocabulary, *_ = SIZES[size]
    sample = Path(mobilellm.__file__).parent / "sample/tiny_shakespeare.txt.gz"
    (folder / "text.txt").write_bytes(gzip.decompress(sample.read_bytes()))
    prepare([Source("text", [folder / "text.txt"])], folder / "data", vocab_size=1024)
    manifest = json.loads((folder / "data/manifest.json").read_text())
    torch.manual_seed(0)
    config = ModelConfig.preset(
        preset, vocab_size=max(vocabulary, manifest["tokenizer"]["vocab_size"])
    )
    (folder / "start").mkdir()
    save_checkpoint(folder / "start", Network(config), None, {})


def batches(recipe: Any) -> list[Any]:
    """The (inputs, targets) of every step, in our loader's order."""
    from mobilellm.data.loader import DataState, Loader
    from mobilellm.data.token_folder import TokenFolder

    data = TokenFolder.open(Path(recipe.data.path))
    state = DataState(seed=0, epoch=0, samples=0, fingerprint=data.fingerprint)
    loader = Loader(
        data.tokens("train"), recipe.data.sequence_length, recipe.batching().sequences, state
    )
    return [batch for (batch, _), _ in zip(loader, range(recipe.train.steps), strict=False)]


def hugging_face(folder: Path, size: str, precision: str) -> dict[str, Any]:
    """transformers.Trainer."""
    import torch
    from torch.utils.data import Dataset, SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    recipe = settings(folder, size, precision)
    rows = [
        {"input_ids": torch.from_numpy(x), "labels": torch.from_numpy(y)}
        for batch in batches(recipe)
        for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, i: int) -> Any:
            return rows[i]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            # The targets are the tokens after the inputs already: the model's own shift would drop
            # one of each sample.
            logits = model(input_ids=inputs["input_ids"]).logits.float()
            return torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), inputs["labels"].flatten()
            )

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)
            done(seconds[-1])

    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=recipe.batching().sequences,
        max_steps=recipe.train.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bf16",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "seconds": seconds, "peak_bytes": memory("VmHWM") - before}


def ours(folder: Path, size: str, precision: str, changes: str = "") -> dict[str, Any]:
    """`mobilellm train`'s loop; `changes` are settings of [train], KEY=VALUE with spaces."""
    import torch
    import torch._dynamo
    from safetensors.torch import load_file

    from mobilellm.model.weights import load_weights
    from mobilellm.train import loop, rows, start
    from mobilellm.train.resolve import resolve

    recipe = settings(folder, size, precision)
    given = dict(change.split("=", 1) for change in changes.split())
    recipe = recipe.replace("train", **given)
    # As a long run resolves it: compiled wherever a compiler works.
    resolved = resolve(
        recipe.replace("train", steps=10**6),
        torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda"),
    )
    recipe = resolved.replace("train", steps=recipe.train.steps)
    losses: list[float] = []
    seconds: list[float] = []
    peak = 0

    class Clock(rows.Watcher):
        def started(self, trainer: Any, step: int) -> None:
            train = trainer.recipe.train
            settled.update(compile=train.compile, products=train.products)
            load_weights(trainer.network, load_file(folder / "start/model.safetensors"))
            turn()

        def stepped(self, row: dict[str, Any]) -> None:
            nonlocal peak
            losses.append(row["loss"])
            seconds.append(sum(row[f"{key}_seconds"] for key in ("data", "compute", "optimizer")))
            outside.append(
                1
                - (row["compute_seconds"] + row["optimizer_seconds"])
                * row["tokens_per_second"]
                / recipe.train.batch_tokens
            )
            if row["step"] < recipe.train.steps:  # the last one has its checkpoint in it
                peak = memory("VmHWM")
                done(seconds[-1])
                turn()
            else:
                done(seconds[-1])

    outside: list[float] = []
    settled: dict[str, str] = {}
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    # The data's vocabulary is 1024; the network keeps the one it was made with.
    real = loop.model_config
    loop.model_config = lambda *_: real_config(folder)  # type: ignore[assignment]
    try:
        start.train(folder / f"ours-{precision}-{changes}", recipe, Clock())
    finally:
        loop.model_config = real
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": peak - before,
        "settings": settled,
        "outside_network_and_optimizer": statistics.median(outside[3:]),
    }


def real_config(folder: Path) -> Any:
    """The configuration of the first weights."""
    from mobilellm.model.config import ModelConfig

    return ModelConfig.read(folder / "start/config.json")


def fastest_product(n: int, k: int, m: int, dtype: Any) -> float:
    """Seconds of a product of (n, k) and (k, m), in the fastest of the forms that a linear layer
    and its gradients have it, by any library."""
    import torch
    import torch.nn.functional as F

    from mobilellm.kernels import bf16x6

    a, b = torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype)
    forms = [lambda: F.linear(a, b)]
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if product is not None:
        forms.append(lambda: product(a, b, None, "none", [], ""))
    if dtype == torch.float32 and not bf16x6.fault():
        forms.append(lambda: bf16x6.multiply(a, b.t()))
    best = float("inf")
    for _ in range(6):
        for form in forms:
            start = time.perf_counter()
            form()
            best = min(best, time.perf_counter() - start)
    return best


def linears(config: Any) -> list[tuple[int, int, int]]:
    """What a network's matrix products take and give, and how many there are of each: the output
    layer's is the last."""
    wide, inner, layers = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )
    heads, grouped, head = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    return [
        (wide, (heads + 2 * grouped) * head, layers),
        (heads * head, wide, layers),
        (wide, 2 * inner, layers),
        (inner, wide, layers),
        (wide, config.vocab_size, 1),
    ]


def bound(folder: Path, size: str, precision: str) -> dict[str, float]:
    """Seconds that the matrix products of a step take at their fastest here, and their FLOP."""
    import torch

    config, dtype = real_config(folder), torch.bfloat16 if precision == "bf16" else torch.float32
    _, _, length, rows, _ = SIZES[size]
    tokens, layers, head = length * rows, config.num_hidden_layers, config.head_dim
    heads, grouped = config.num_attention_heads, config.num_key_value_heads
    seconds = flops = 0.0
    for into, out, count in linears(config):
        # The output, the gradient by the input, and that by the weight.
        for shape in ((tokens, into, out), (tokens, out, into), (out, tokens, into)):
            seconds += count * fastest_product(*shape, dtype)
            flops += count * 2.0 * tokens * into * out
    # Attention: two products forward and five backward over what causality leaves, in blocks.
    together = heads // grouped
    block = fastest_product(together * 128, head, length, dtype)
    attention = 7 * layers * rows * grouped * (length / 128) * block / 2
    flops += 7 * layers * rows * heads * length * length * head
    return {"seconds": seconds + attention, "flops": flops}


class Contestant:
    """A process that makes a step each time it is told to."""

    def __init__(self, kind: str, folder: Path, size: str, precision: str, changes: str) -> None:
        command = [sys.executable, __file__, "--contestant"]
        self.process = subprocess.Popen(
            [*command, "|".join((kind, str(folder), size, precision, changes))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line("READY")  # the other sides are set up after it: ours measures the machine

    def step(self) -> tuple[float, float]:
        """Wall clock and processor time of one step, made now, in seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        wall, processor = map(float, self._line("STEP").split())
        return wall, processor

    def result(self) -> dict[str, Any]:
        """What it found, once all steps are made."""
        found: dict[str, Any] = json.loads(self._line("RESULT"))
        self.process.wait()
        return found

    def _line(self, mark: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if mark in line:
                return line.rpartition(mark)[2]
        raise SystemExit("a contestant ended early")


def compete(size: str, precision: str, against: str | None) -> dict[str, Any]:
    """One row: both sides in turn."""
    from mobilellm.model.costs import ModelCosts

    _, _, length, rows, steps = SIZES[size]
    tokens = length * rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        set_up(folder, size)
        peer = ("hf", "") if against is None else ("ours", against)
        sides = {
            "hf": Contestant(peer[0], folder, size, precision, peer[1]),
            "ours": Contestant("ours", folder, size, precision, ""),
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in sides}
        processor: dict[str, list[float]] = {kind: [] for kind in sides}
        for _ in range(steps):
            for kind, side in sides.items():
                for kept, taken in zip((seconds, processor), side.step(), strict=True):
                    kept[kind].append(taken)
        found = {kind: side.result() for kind, side in sides.items()}
        least = bound(folder, size, precision)
        parameters = ModelCosts.of(real_config(folder)).parameters["total"]
    middle = {kind: statistics.median(taken[3:]) for kind, taken in seconds.items()}
    ratios = [
        statistics.median(
            theirs / mine for theirs, mine in zip(one["hf"][3:], one["ours"][3:], strict=True)
        )
        for one in (seconds, processor)
    ]
    apart = [
        abs(a - b) for a, b in zip(found["hf"]["losses"], found["ours"]["losses"], strict=True)
    ]
    return {
        "size": size,
        "precision": precision,
        "peer": "transformers.Trainer" if against is None else f"ours with {against}",
        "sequences": rows,
        "sequence_length": length,
        "steps": steps,
        "tokens_per_second": {kind: tokens / taken for kind, taken in middle.items()},
        "speed_ratio": ratios[0],
        "processor_time_ratio": ratios[1],
        "seconds": seconds,
        "processor_seconds": processor,
        "bound_seconds": least["seconds"],
        "share_of_bound": least["seconds"] / middle["ours"],
        "flops": least["flops"],
        "parameters": parameters,
        "peak_bytes": {kind: one["peak_bytes"] for kind, one in found.items()},
        "memory_ratio": found["ours"]["peak_bytes"] / found["hf"]["peak_bytes"],
        "largest_loss_difference": max(apart),
        "settings": found["ours"]["settings"],
        "outside_network_and_optimizer": found["ours"]["outside_network_and_optimizer"],
        "losses": {kind: one["losses"] for kind, one in found.items()},
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SIZES), help="one size")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        help="one precision; else fp32, and bf16 where it is fast",
    )
    parser.add_argument("--steps", type=int, help="of each side, above 3; else by size")
    parser.add_argument("--threads", type=int, help="of both sides; else torch's choice")
    parser.add_argument(
        "--against", nargs="+", help="ours with these settings of [train] in the Trainer's place"
    )
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        kind, folder, size, precision, changes = arguments.contestant.split("|")
        found = (
            hugging_face(Path(folder), size, precision)
            if kind == "hf"
            else ours(Path(folder), size, precision, changes)
        )
        print("RESULT" + json.dumps(found), flush=True)
        return
    if arguments.steps:
        os.environ["BENCHMARK_STEPS"] = str(arguments.steps)
        SIZES.update({name: (*size[:4], arguments.steps) for name, size in SIZES.items()})
    if arguments.threads:  # as every contestant reads it
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch
    import transformers

    from mobilellm.hardware.description import describe
    from mobilellm.model.precision import Precision

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = {k: v for k, v in describe(here).items() if k != "command"}
    precisions = (
        [arguments.precision]
        if arguments.precision
        else sorted({"fp32", Precision.fast_on(here).value}, reverse=True)
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine['device']}, {torch.get_num_threads()} threads, {versions}")
    results = []
    against = " ".join(arguments.against) if arguments.against else None
    for size in [arguments.only] if arguments.only else ["demo", "125M"]:
        for precision in precisions:
            row = compete(size, precision, against)
            results.append(row)
            speed, peak = row["tokens_per_second"], row["peak_bytes"]
            print(
                f"{size} {precision}: {row['sequences']} x {row['sequence_length']} tokens, "
                f"{row['steps']} steps: {row['peer']} {speed['hf']:,.0f} tokens/s, "
                f"{peak['hf'] / 2**20:,.0f} MiB; ours {speed['ours']:,.0f} "
                f"({row['speed_ratio']:.2f}x, by processor time "
                f"{row['processor_time_ratio']:.2f}x), "
                f"{peak['ours'] / 2**20:,.0f} MiB ({row['memory_ratio']:.2f}x); "
                f"losses within {row['largest_loss_difference']:.1e}; "
                f"outside network and optimizer {row['outside_network_and_optimizer']:.1%}; "
                f"products alone {row['bound_seconds']:.3f} s, {row['share_of_bound']:.0%} of ours",
                flush=True,
            )
    if arguments.save:
        record = {
            "benchmark": "trainer_vs_hf",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "transformers": transformers.__version__,
            "results": results,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
