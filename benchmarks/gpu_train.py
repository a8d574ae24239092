"""Training on a GPU, everything by one command: speed, settings, kernels, and Hugging Face's
Trainer beside it.

    python benchmarks/gpu_train.py --save benchmarks/results/gpu_train.json
    python benchmarks/gpu_train.py --only 1B --quick    # its settings, transformers, kernels
    python benchmarks/gpu_train.py --smoke     # the same program, tiny, on any machine

For each size it finds the largest micro-batch that fits, then sweeps compilation, attention kernel,
chunked or whole loss and micro-batch one at a time around the best, and profiles ten steps for the
kernels that take most time. A step is forward, backward, clipping and AdamW on random tokens; speed
is the median of the steps after the warm-up, memory the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

SIZES = {"125M": 64, "350M": 32, "1B": 16}  # preset: largest micro-batch tried
SEQUENCE_LENGTH = 2048
VOCABULARY = 32000
WARM_UP, STEPS = 5, 15
FLASH = ("flash", "cudnn", "efficient")
CHUNKS = (1 << 22, 1 << 25, 1 << 28)  # logits of the chunked loss that are held at once
BEST: dict[str, Any] = {
    "compile": True,
    "attention": "auto",
    "loss": "chunked",
    "chunk": CHUNKS[-1],
    "fused": True,
}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def clear(device: torch.device) -> None:
    """Forget the contestant before."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def attention(kernel: str) -> Any:
    """Restrict scaled_dot_product_attention to one kernel; "auto" leaves torch its choice."""
    if kernel == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    with sdpa_kernel(names[kernel]):
        yield


class Contestant:
    """Our network and optimizer with some settings; a step at a time."""

    def __init__(
        self,
        device: torch.device,
        preset: str,
        micro: int,
        length: int,
        vocabulary: int,
        settings: dict[str, Any],
    ) -> None:
        from mobilellm.distributed.parallel import Parallel
        from mobilellm.distributed.world import World
        from mobilellm.model.config import ModelConfig
        from mobilellm.model.network import Network
        from mobilellm.model.precision import Precision
        from mobilellm.optimizers.optimizer import build
        from mobilellm.recipe.recipe import OptimizerSection, Recipe, TrainSection

        self.settings = settings
        precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
        mode = settings["compile"]
        recipe = Recipe(
            train=TrainSection(
                precision=precision.value, compile="block" if mode is True else "off"
            )
        )  # type: ignore[arg-type]
        torch.manual_seed(0)
        config = ModelConfig.preset(preset, vocab_size=vocabulary, max_position_embeddings=length)
        self.network = Network(config).to(device)
        if isinstance(mode, str):
            for layer in self.network.layers:
                layer.compile(dynamic=False, mode=mode)
        self.documents = None
        if settings.get("documents"):
            each = -(-length // settings["documents"])
            self.documents = (torch.arange(length, device=device) // each).expand(micro, length)
        self.parallel = Parallel(self.network, recipe, World(device=device))
        self.optimizers = build(self.network, OptimizerSection(), precision)
        self.precision = precision
        self.ids = torch.randint(vocabulary, (micro, length + 1), device=device)

    def loss(self) -> torch.Tensor:
        x, y = self.ids[:, :-1], self.ids[:, 1:]
        if self.settings["loss"] == "chunked":
            return self.parallel(x, y, self.documents) / y.numel()
        with self.precision.autocast(x.device):
            logits = self.network(x)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    def step(self) -> torch.Tensor:
        from mobilellm.model import loss as losses

        losses.GPU_CHUNK_NUMBERS = self.settings["chunk"]
        if not self.settings["fused"]:
            losses.fused_on_gpu = lambda: False
        with attention(self.settings["attention"]):
            loss = self.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Plain:
    """transformers' LlamaForCausalLM with fused AdamW under bf16 autocast: what the Trainer runs,
    without its own overhead."""

    def __init__(
        self, device: torch.device, preset: str, micro: int, length: int, vocabulary: int
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        from mobilellm.model.config import ModelConfig

        values = ModelConfig.preset(preset, vocab_size=vocabulary).to_dict()
        scaling, theta = values.pop("rope_scaling"), values.pop("rope_theta")
        assert scaling is None
        self.network = LlamaForCausalLM(
            LlamaConfig(**values, rope_parameters={"rope_theta": theta, "rope_type": "default"})
        ).to(device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-3, weight_decay=0.1, fused=True
        )
        self.device = device
        self.ids = torch.randint(vocabulary, (micro, length), device=device)

    def step(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.network(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def timed(device: torch.device, make: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Tokens a second and peak bytes; an "error" where memory runs out or a kernel refuses."""
    clear(device)
    try:
        contestant = make()
        for _ in range(min(WARM_UP, steps)):
            contestant.step()
        synchronize(device)
        taken = []
        for _ in range(steps):
            start = time.perf_counter()
            loss = contestant.step()
            synchronize(device)
            taken.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return {
            "tokens_per_second": tokens / statistics.median(taken),
            "peak_bytes": peak,
            "final_loss": loss.item(),
        }
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:200]}


KINDS = (
    ("attention", ("sdpa", "flash", "fmha", "flex")),
    ("products", ("nvjet", "gemm", "cutlass", "cublas", "_mm_")),
    ("elementwise and sums", ("triton", "elementwise", "reduce", "vectorized")),
    ("copies", ("memcpy", "memset", "copy")),
    ("optimizer", ("multi_tensor", "adam")),
)
"""What a kernel does, by parts of its name in lower case; the first that fits."""


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    lower = name.lower()
    return next((k for k, parts in KINDS if any(part in lower for part in parts)), "other")


def kernels(device: torch.device, contestant: Contestant, steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind of kernel, kernels started a step, and the twenty that take most
    (on a CPU: operations)."""
    from mobilellm.hardware.profiler import profiler

    for _ in range(3):
        contestant.step()
    synchronize(device)
    with profiler(device) as profile:
        for _ in range(steps):
            contestant.step()
        synchronize(device)
    cuda = device.type == "cuda"

    def taken(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    # On a GPU the rows that are kernels themselves: neither the operations that started them nor
    # the named stretches of compiled code, in which kernels would count twice.
    events = [
        e
        for e in profile.key_averages()
        if taken(e) > 0 and (not cuda or (e.cpu_time_total == 0 and not e.key.startswith("## ")))
    ]
    kinds: dict[str, float] = {}
    for e in events:
        kinds[kind_of(e.key)] = kinds.get(kind_of(e.key), 0.0) + taken(e) / 1e3 / steps
    total = sum(map(taken, events)) or 1.0
    top = sorted(events, key=taken, reverse=True)[:20]
    return {
        "milliseconds_a_step": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "started_a_step": sum(e.count for e in events) / steps,
        "top": [
            {
                "name": e.key[:120],
                "share": taken(e) / total,
                "milliseconds_a_step": taken(e) / 1e3 / steps,
                "started_a_step": e.count / steps,
            }
            for e in top
        ],
    }


def measure(
    device: torch.device,
    preset: str,
    largest: int,
    length: int,
    vocabulary: int,
    steps: int,
    quick: bool = False,
) -> dict[str, Any]:
    """Everything about one size; `quick` leaves out settings that are known to lose."""
    from mobilellm.hardware.probes import peak_flops
    from mobilellm.model import loss as losses
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.costs import ModelCosts
    from mobilellm.model.precision import Precision
    from mobilellm.optimizers.optimizer import OPTIMIZERS
    from mobilellm.plan.batching import Batching
    from mobilellm.plan.memory import estimate

    best = BEST

    def run(micro: int, **changes: Any) -> dict[str, Any]:
        settings = best | changes
        result = timed(
            device,
            lambda: Contestant(device, preset, micro, length, vocabulary, settings),
            micro * length,
            steps,
        )
        print(
            f"  {preset} micro-batch {micro:>3} {settings}: "
            f"{result.get('tokens_per_second', 0):,.0f} tokens/s "
            f"{result.get('peak_bytes', 0) / 2**30:.1f} GiB {result.get('error', '')}",
            flush=True,
        )
        return {"micro_batch_size": micro} | settings | result

    sweep, micro = [], largest
    while micro >= 1:
        sweep.append(run(micro))
        micro //= 2
        if len([s for s in sweep if "error" not in s]) >= (1 if quick else 3):
            break
    good = [s for s in sweep if "error" not in s]
    if not good:
        return {"preset": preset, "sweep": sweep}
    micro = max(good, key=lambda s: s["tokens_per_second"])["micro_batch_size"]
    cuda = device.type == "cuda"
    if not quick:
        sweep += [run(micro, compile=False), run(micro, loss="whole")]
        sweep += [run(micro, attention=kernel) for kernel in (FLASH if cuda else ("math",))]
    if cuda and not quick:
        sweep += [run(micro, chunk=chunk) for chunk in CHUNKS[:-1]]
        with_own_kernels = losses.fused_on_gpu
        sweep.append(run(micro, fused=False))
        losses.fused_on_gpu = with_own_kernels
        # A search for faster products took minutes and found none (docs/log.md).
        sweep.append(run(micro, compile="max-autotune-no-cudagraphs"))
    if cuda:
        # Samples of eight documents, by FlexAttention: what the mask costs or saves.
        sweep.append(run(micro, documents=8))
    good = [s for s in sweep if "error" not in s]
    alike = [s for s in good if not s.get("documents")]
    winner = max(alike, key=lambda s: s["tokens_per_second"])
    peers = []
    peer_micro = winner["micro_batch_size"]
    while peer_micro >= 1:
        peer = timed(
            device,
            lambda m=peer_micro: Plain(device, preset, m, length, vocabulary),
            peer_micro * length,
            steps,
        )  # type: ignore[misc]
        peers.append({"micro_batch_size": peer_micro} | peer)
        print(
            f"  {preset} transformers, micro-batch {peer_micro}: "
            f"{peer.get('tokens_per_second', 0):,.0f} tokens/s "
            f"{peer.get('peak_bytes', 0) / 2**30:.1f} GiB {peer.get('error', '')}",
            flush=True,
        )
        if "error" not in peer:
            break
        peer_micro //= 2
    clear(device)
    settings = {key: winner[key] for key in best}
    top = kernels(
        device,
        Contestant(device, preset, winner["micro_batch_size"], length, vocabulary, settings),
        min(10, steps),
    )
    config = ModelConfig.preset(preset, vocab_size=vocabulary)
    flops = ModelCosts.of(config).flops_per_token(length)
    precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
    peak = peak_flops(device, precision.dtype)
    size = winner["micro_batch_size"]
    batching = Batching.of(
        sequence_length=length, batch_tokens=size * length, micro_batch_size=size
    )
    expected = estimate(config, batching, precision=precision, optimizer=OPTIMIZERS["adamw"].costs)
    return {
        "preset": preset,
        "sequence_length": length,
        "best": winner,
        "sweep": sweep,
        "transformers": peers,
        "speed_ratio": winner["tokens_per_second"] / peers[-1]["tokens_per_second"]
        if "error" not in peers[-1]
        else None,
        "mfu_6n": winner["tokens_per_second"] * flops["six_n"] / peak,
        "mfu_palm": winner["tokens_per_second"] * flops["palm"] / peak,
        "estimated_bytes": expected.peak,
        "kernels": top,
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(SIZES), help="one size")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny size and few steps, on any device"
    )
    parser.add_argument("--quick", action="store_true", help="leave out what is known to lose")
    parser.add_argument(
        "--kernels", type=int, help="only where the time of a step goes, at this micro-batch"
    )
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    from mobilellm.hardware.description import describe
    from mobilellm.hardware.probes import pick_device

    device = pick_device()
    if device.type != "cuda" and not arguments.smoke:
        raise SystemExit("no GPU here; --smoke runs the program on this device")
    machine = {k: v for k, v in describe(device).items() if k != "command"}
    print(f"{machine['device']}, torch {torch.__version__}")
    results = []
    for preset, largest in {"1M": 2}.items() if arguments.smoke else SIZES.items():
        if arguments.only in (None, preset):
            length, vocabulary, steps = (
                (64, 512, 2) if arguments.smoke else (SEQUENCE_LENGTH, VOCABULARY, STEPS)
            )
            if arguments.kernels:
                contestant = Contestant(device, preset, arguments.kernels, length, vocabulary, BEST)
                print(json.dumps(kernels(device, contestant, min(10, steps)), indent=1))
                continue
            result = measure(device, preset, largest, length, vocabulary, steps, arguments.quick)
            results.append(result)
            if "best" in result:
                ratio = (
                    f", {result['speed_ratio']:.2f}x transformers" if result["speed_ratio"] else ""
                )
                print(
                    f"{preset}: {result['best']['tokens_per_second']:,.0f} tokens/s, "
                    f"{result['mfu_6n']:.1%} MFU (6N), "
                    f"{result['mfu_palm']:.1%} (PaLM){ratio}"
                )
                print("    " + json.dumps(result["kernels"]["milliseconds_a_step"]))
                for kernel in result["kernels"]["top"]:
                    print(
                        f"    {kernel['share']:6.1%} {kernel['milliseconds_a_step']:8.2f} ms "
                        f"{kernel['started_a_step']:6.0f}  {kernel['name'][:90]}"
                    )
            if arguments.save:  # after each size, so that a time limit leaves what was measured
                record = {
                    "benchmark": "gpu_train",
                    "date": datetime.date.today().isoformat(),
                    "machine": machine,
                    "results": results,
                }
                arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
