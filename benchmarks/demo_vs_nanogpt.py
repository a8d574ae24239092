"""Held-out bits per byte on tiny Shakespeare, ours against nanoGPT's CPU recipe, both given the
same wall clock.

    python benchmarks/demo_vs_nanogpt.py --seconds 240
    python benchmarks/demo_vs_nanogpt.py --seconds 240 --precision fp32   # ours without bf16

The peer is a character-level GPT as nanoGPT's README trains it on a CPU: 4 layers, 4 heads, 128
wide, context 64, batch 12, no dropout, no bias, AdamW at 1e-3 (betas 0.9 and 0.99, decay 0.1), 100
steps of warm-up, cosine to 1e-4, 2,000 steps (1.88 nats a character there). It is written here anew
in plain PyTorch. When 2,000 steps leave time, its schedule is stretched to fill it. Ours is what
`mobilellm quickstart` trains. Both split at nine tenths of the text; all text is one byte a
character, so nats a character / ln 2 are bits a byte. Each trains alone, one after the other;
evaluations are not counted, for both.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import math
import shutil
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Curve = list[tuple[float, float]]  # (seconds of training, held-out bits per byte)
CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 12, 128, 4, 4


class PeerBlock(nn.Module):
    """A GPT-2 block without biases: attention and a four times wider GELU layer, each behind a
    layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.up, self.down = (
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.Linear(4 * WIDTH, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, HEADS, C // HEADS).transpose(1, 2)
            for t in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Peer(nn.Module):
    """The character-level GPT, output layer tied to the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(PeerBlock() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.tokens.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def sample_text() -> str:
    """Tiny Shakespeare, from the package."""
    return gzip.decompress(
        (files("mobilellm") / "sample" / "tiny_shakespeare.txt.gz").read_bytes()
    ).decode()


def train_peer(seconds: float, points: int) -> Curve:
    """Train the peer for `seconds`."""
    text = sample_text()
    index = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[c] for c in text])
    train, held_out = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    torch.manual_seed(0)
    peer = Peer(len(index))
    matrices = [p for p in peer.parameters() if p.ndim == 2]
    vectors = [p for p in peer.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    @torch.inference_mode()
    def score() -> float:
        rows = (len(held_out) - 1) // CONTEXT
        x, y = (
            held_out[: rows * CONTEXT].view(rows, CONTEXT),
            held_out[1 : rows * CONTEXT + 1].view(rows, CONTEXT),
        )
        nats = sum(
            peer(a, b, "sum").item() for a, b in zip(x.split(256), y.split(256), strict=True)
        )
        return float(nats / (rows * CONTEXT) / math.log(2))

    def step(rate: float) -> None:
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        window = train[starts[:, None] + torch.arange(CONTEXT + 1)]
        for group in optimizer.param_groups:
            group["lr"] = rate
        peer(window[:, :-1], window[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    begun, done = time.perf_counter(), 0
    while done < 20:  # speed, to know how many steps fit; they count as warm-up
        step(1e-5 * (done + 1))
        done += 1
    steps = max(2000, int(seconds / ((time.perf_counter() - begun) / done)))
    curve: Curve = []
    spent, resumed = time.perf_counter() - begun, time.perf_counter()
    while spent < seconds:
        progress = min(1.0, max(0.0, (done - 100) / (steps - 100)))
        step(
            1e-3 * min(1.0, (done + 1) / 100)
            if done < 100
            else 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * progress))
        )
        done += 1
        now = time.perf_counter()
        spent, resumed = spent + now - resumed, now
        if spent >= seconds * (len(curve) + 1) / points or done == 2000:
            curve.append((spent, score()))
            resumed = time.perf_counter()
    print(f"nanoGPT's CPU recipe: {done} steps in {spent:.0f} s")
    return curve


def train_ours(seconds: float, precision: str, folder: Path) -> tuple[Curve, dict[str, Any]]:
    """Train what `mobilellm quickstart` trains, for about `seconds` (compilation included)."""
    from mobilellm.cli.quickstart import HELD_OUT, Quickstart
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source
    from mobilellm.train import start
    from mobilellm.train.rows import Watcher
    from mobilellm.workflows.quickstart import recipe_for

    quick = Quickstart()
    sample = folder / "sample.txt"
    sample.write_text(sample_text())
    prepare(
        [Source("sample", [sample])],
        folder / "data",
        vocab_size=quick.vocab_size,
        held_out=HELD_OUT,
    )
    recipe = recipe_for(folder / "data", quick.preset, seconds=seconds, precision=precision)
    rows: list[dict[str, Any]] = []

    class Keep(Watcher):
        def stepped(self, row: dict[str, Any]) -> None:
            rows.append(row)

    start.train(folder / "run", recipe, Keep())
    spent, before, curve = 0.0, 0, []
    for row in rows:
        spent, before = spent + (row["tokens"] - before) / row["tokens_per_second"], row["tokens"]
        if "held_out_bits_per_byte" in row:
            curve.append((spent, row["held_out_bits_per_byte"]))
    print(
        f"ours: {recipe.train.steps} steps in {spent:.0f} s, {recipe.train.precision}, compile "
        f"{recipe.train.compile}"
    )
    return curve, {
        "precision": recipe.train.precision,
        "compile": recipe.train.compile,
        "steps": recipe.train.steps,
    }


def main() -> None:
    """Train both, print the curves and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=240,
        help="wall clock for ours; the peer gets what it came to",
    )
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16"), help="of ours"
    )
    parser.add_argument("--points", type=int, default=8, help="evaluations along the way")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        ours, settings = train_ours(arguments.seconds, arguments.precision, folder)
        peer = train_peer(ours[-1][0], arguments.points)  # as long as ours really took
    finally:
        shutil.rmtree(folder)
    print("\nseconds  nanoGPT recipe  bits a byte")
    for seconds, bits in peer:
        print(f"{seconds:7.0f}  {bits:.4f}")
    print("\nseconds  ours            bits a byte")
    for seconds, bits in ours:
        print(f"{seconds:7.0f}  {bits:.4f}")
    overtaken = next((s for s, bits in ours if bits <= peer[-1][1]), None)
    print(
        f"\nlast: ours {ours[-1][1]:.4f}, nanoGPT's recipe {peer[-1][1]:.4f}, ratio "
        f"{ours[-1][1] / peer[-1][1]:.3f}"
    )
    print(
        f"ours is below the peer's last figure after {overtaken:.0f} s"
        if overtaken
        else "ours never gets below the peer"
    )
    if arguments.save:
        from mobilellm.hardware.description import describe

        machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
        record = {
            "benchmark": "demo_vs_nanogpt",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "seconds": arguments.seconds,
            "ours": {"curve": ours} | settings,
            "nanogpt": {"curve": peer},
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
