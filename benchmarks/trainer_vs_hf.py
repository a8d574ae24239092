"""Training against Hugging Face's Trainer: the same weights, the same batches, the same precision,
one after the other.

    pip install accelerate                                  # which the Trainer asks for
    python benchmarks/trainer_vs_hf.py   # fp32 and what the device is fast at
    python benchmarks/trainer_vs_hf.py --only demo --save benchmarks/results/trainer_vs_hf.json

Each contestant trains in a process of its own: transformers.Trainer on LlamaForCausalLM as its
documentation has it (fused AdamW, eager), and `mobilellm train`'s loop as it resolves its settings
here. Speed is the median step after the third; memory is the peak of resident memory over what was
held before the model was built, without the last checkpoint, which the Trainer is told not to
write. The losses of all steps are compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
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
LEARNING_RATE = 1e-3


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
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

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


def ours(folder: Path, size: str, precision: str, compiled: str = "auto") -> dict[str, Any]:
    """`mobilellm train`'s loop."""
    import torch
    import torch._dynamo
    from safetensors.torch import load_file

    from mobilellm.model.weights import load_weights
    from mobilellm.train import loop, rows, start
    from mobilellm.train.resolve import resolve

    recipe = settings(folder, size, precision)
    # As a long run resolves it: compiled wherever a compiler works.
    resolved = resolve(
        recipe.replace("train", steps=10**6),
        torch.device("cpu") if not torch.cuda.is_available() else torch.device("cuda"),
    )
    recipe = recipe.replace(
        "train", compile=resolved.train.compile if compiled == "auto" else compiled
    )
    losses: list[float] = []
    seconds: list[float] = []
    peak = 0

    class Clock(rows.Watcher):
        def started(self, trainer: Any, step: int) -> None:
            load_weights(trainer.network, load_file(folder / "start/model.safetensors"))

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

    outside: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    # The data's vocabulary is 1024; the network keeps the one it was made with.
    real = loop.model_config
    loop.model_config = lambda *_: real_config(folder)  # type: ignore[assignment]
    try:
        start.train(folder / f"ours-{precision}", recipe, Clock())
    finally:
        loop.model_config = real
    return {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": peak - before,
        "compile": recipe.train.compile,
        "outside_network_and_optimizer": statistics.median(outside[3:]),
    }


def real_config(folder: Path) -> Any:
    """The configuration of the first weights."""
    from mobilellm.model.config import ModelConfig

    return ModelConfig.read(folder / "start/config.json")


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
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        kind, folder, size, precision = arguments.contestant.split("|")
        print(
            "RESULT"
            + json.dumps({"hf": hugging_face, "ours": ours}[kind](Path(folder), size, precision))
        )
        return
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
    for size in [arguments.only] if arguments.only else ["demo", "125M"]:
        _, _, length, rows, _ = SIZES[size]
        for precision in precisions:
            found = {}
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                set_up(folder, size)
                for kind in ("hf", "ours"):
                    done = subprocess.run(
                        [
                            sys.executable,
                            __file__,
                            "--contestant",
                            f"{kind}|{folder}|{size}|{precision}",
                        ],
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                    found[kind] = json.loads(done.stdout.rpartition("RESULT")[2])
            speed = {
                kind: length * rows / statistics.median(one["seconds"][3:])
                for kind, one in found.items()
            }
            apart = [
                abs(a - b)
                for a, b in zip(found["hf"]["losses"], found["ours"]["losses"], strict=True)
            ]
            result = {
                "size": size,
                "precision": precision,
                "sequences": rows,
                "sequence_length": length,
                "steps": len(apart),
                "tokens_per_second": speed,
                "speed_ratio": speed["ours"] / speed["hf"],
                "peak_bytes": {kind: one["peak_bytes"] for kind, one in found.items()},
                "memory_ratio": found["ours"]["peak_bytes"] / found["hf"]["peak_bytes"],
                "largest_loss_difference": max(apart),
                "compile": found["ours"]["compile"],
                "outside_network_and_optimizer": found["ours"]["outside_network_and_optimizer"],
                "losses": {kind: one["losses"] for kind, one in found.items()},
            }
            results.append(result)
            print(
                f"{size} {precision}: {rows} x {length} tokens, {len(apart)} steps: Trainer "
                f"{speed['hf']:,.0f} tokens/s, "
                f"{found['hf']['peak_bytes'] / 2**20:,.0f} MiB; ours {speed['ours']:,.0f} "
                f"({result['speed_ratio']:.2f}x), "
                f"{found['ours']['peak_bytes'] / 2**20:,.0f} MiB ({result['memory_ratio']:.2f}x); "
                f"losses within {max(apart):.1e}; "
                f"outside network and optimizer {result['outside_network_and_optimizer']:.1%}",
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
