"""A whole run on a GPU by the command line, and decoding there.

    mobilellm prepare TEXT --out DATA --vocab-size 32000
    python benchmarks/gpu_run.py DATA --save benchmarks/results/gpu_run.json
    python benchmarks/gpu_run.py DATA --preset 1M --steps 20 --batch-tokens 4096  # anywhere
    python benchmarks/gpu_run.py --save benchmarks/results/gpu_decode.json        # decoding alone

`mobilellm train` in a process of its own: one run undisturbed, and one that is killed (SIGKILL)
after its first checkpoint and goes on; on a CPU their losses have to be equal to the last bit (on a
GPU attention's gradient is added up in no fixed order), elsewhere it is told how far apart they
are. Then the run's model, or one of random weights where there was no run, continues a prompt here
and in transformers, in float32 and bf16: tokens a second.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mobilellm.files import write_json
from mobilellm.hardware.description import describe
from mobilellm.hardware.probes import pick_device
from mobilellm.interop.folder import save_checkpoint
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network


def command(run: Path, data: Path, arguments: argparse.Namespace) -> list[str]:
    """The command line of a run."""
    return [
        sys.executable, "-m", "mobilellm", "train", "--out", str(run), "--data.path", str(data),
        "--model.preset", arguments.preset, "--train.steps", str(arguments.steps),
        "--train.batch-tokens", str(arguments.batch_tokens),
        "--train.compile", arguments.compile, "--optimizer.warmup-steps", "10",
        "--train.checkpoint-every", str(arguments.steps // 3),
    ]  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    """Step -> loss."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


def whole_runs(folder: Path, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run undisturbed and one killed and resumed."""
    start = time.perf_counter()
    subprocess.run(command(folder / "whole", data, arguments), check=True)
    seconds = time.perf_counter() - start
    process = subprocess.Popen(command(folder / "killed", data, arguments))
    while process.poll() is None and not list((folder / "killed").glob("checkpoints/step-*")):
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(losses(folder / "killed"))
    resume = [sys.executable, "-m", "mobilellm", "train", "--resume", str(folder / "killed")]
    subprocess.run(resume, check=True)
    one, two = losses(folder / "whole"), losses(folder / "killed")
    last = json.loads((folder / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "seconds": seconds,
        "tokens_per_second": last["tokens_per_second"],
        "mfu_6n": last["mfu_6n"],
        "first_loss": one[min(one)],
        "last_loss": one[max(one)],
        "killed_after_step": before,
        "largest_difference": max(abs(one[step] - two[step]) for step in one),
        "result": json.loads((folder / "whole" / "result.json").read_text())["held_out"],
    }


def random_model(folder: Path, preset: str) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    folder.mkdir()
    network = Network(ModelConfig.preset(preset, vocab_size=32000))
    save_checkpoint(folder, network, None, {"made_by": "benchmarks/gpu_run.py"})
    return folder


def decoding(model: Path, device: torch.device, new: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of ours and of transformers, by precision, after 64 tokens of prompt."""
    from transformers import AutoModelForCausalLM

    from mobilellm.interop.load import load

    found: dict[str, Any] = {}
    prompt = torch.randint(3, 999, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours = load(model).network.to(device, dtype).eval()
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        ids = torch.tensor([prompt], device=device)

        def run_ours(network: Any = ours) -> list[int]:
            return list(network.generate(prompt, new, stop=()))

        def run_theirs(network: Any = theirs, ids: torch.Tensor = ids) -> list[int]:
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
            return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

        taken: dict[str, list[float]] = {"ours": [], "transformers": []}
        texts: dict[str, list[int]] = {}
        for repeat in range(repeats + 1):
            for side, run in (("ours", run_ours), ("transformers", run_theirs)):
                start = time.perf_counter()
                texts[side] = run()
                if repeat:
                    taken[side].append(time.perf_counter() - start)
        same = sum(a == b for a, b in zip(texts["ours"], texts["transformers"], strict=True))
        found[name] = {side: new / statistics.median(times) for side, times in taken.items()}
        found[name]["same_tokens"] = same / new
    return found


def save(
    arguments: argparse.Namespace,
    device: torch.device,
    runs: dict[str, Any],
    written: dict[str, Any],
) -> None:
    """Write what is measured by now, where that is asked for."""
    record = {
        "benchmark": "gpu_run",
        "date": datetime.date.today().isoformat(),
        "machine": {k: v for k, v in describe(device).items() if k != "command"},
        "preset": arguments.preset,
        "steps": arguments.steps,
        "batch_tokens": arguments.batch_tokens,
        "compile": arguments.compile,
        "runs": runs,
        "decode_tokens_per_second": written,
    }
    if arguments.save:
        write_json(arguments.save, record)


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", help="a token folder; without one, no runs")
    parser.add_argument("--preset", default="125M")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--compile", default="auto", help="train.compile")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    device = pick_device()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if arguments.data is not None:
            runs = whole_runs(Path(name), arguments.data, arguments)
            print(json.dumps(runs), flush=True)
            save(arguments, device, runs, {})
            model = max((Path(name) / "whole" / "checkpoints").glob("step-*"))
        else:
            model = random_model(Path(name) / "model", arguments.preset)
        written = decoding(model, device, arguments.new, arguments.repeats)
        print(json.dumps(written))
    save(arguments, device, runs, written)
    if device.type == "cpu" and runs.get("largest_difference"):
        raise SystemExit("the resumed run differs from the undisturbed one")


if __name__ == "__main__":
    main()
