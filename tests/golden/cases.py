"""The golden runs: small trainings whose losses are kept, to the bit, beside this file.

A change that is meant to change nothing computed leaves every file as it is.
`scripts/write_golden` writes them; a commit that changes one says why.

    trace = run_case("adamw", data, folder)     # {"losses": [...], "grad_norms": [...], ...}
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
STEPS = 8

BASE: dict[str, dict[str, Any]] = {
    "model": {"preset": "1M", "override": {"num_hidden_layers": 2}},
    "data": {"sequence_length": 64},
    "train": {
        "steps": STEPS,
        "batch_tokens": 512,
        "precision": "fp32",
        "compile": "off",
        "products": "torch",
        "attention": "torch",
        "evaluate_every": 4,
        "checkpoint_every": 100,
        "log_every": 4,
        "async_checkpoints": False,
        "threads": 1,
        "seed": 7,
    },
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "adamw": {},
    "adamw_no_clipping": {
        "optimizer": {"max_grad_norm": 0.0, "schedule": "linear", "betas": [0.8, 0.9], "eps": 1e-6}
    },
    "muon": {
        "model": {"initial_residual": "zero"},
        "optimizer": {
            "name": "muon",
            "momentum": 0.9,
            "weight_decay": 0.3,
            "embedding_learning_rate": 6e-3,
        },
    },
    "masked_documents": {"data": {"mask_documents": True}},
    "mixture": {
        "data": {
            "stages": [
                {"until_tokens": 2048, "weights": {"first": 0.75, "second": 0.25}},
                {"weights": {"first": 0.2, "second": 0.8}},
            ]
        }
    },
    "sharing_own": {
        "model": {"override": {"num_hidden_layers": 2, "layer_repeats": 2, "shared_kv": "own"}}
    },
    "sharing_first": {
        "model": {"override": {"num_hidden_layers": 2, "layer_repeats": 2, "shared_kv": "first"}}
    },
    "accumulation": {"train": {"micro_batch_size": 2}, "optimizer": {"max_grad_norm": 0.5}},
    "wsd": {
        "optimizer": {
            "schedule": "wsd",
            "decay_steps": 4,
            "decay_shape": "sqrt",
            "final_lr_fraction": 0.0,
        }
    },
    "z_loss_qk_norm": {
        "model": {"override": {"num_hidden_layers": 2, "qk_norm": True}},
        "optimizer": {"z_loss": 1e-3},
    },
    "scaled_batch": {
        "optimizer": {
            "reference_batch_tokens": 2048,
            "batch_scaling": "sqrt",
            "schedule": "constant",
            "embedding_learning_rate": 1e-3,
        }
    },
    "bf16": {"train": {"precision": "bf16"}},
}


def make_data(folder: Path) -> Path:
    """A token folder of two sources, "first" and "second", with many documents each, from the
    text that comes along."""
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source

    text = gzip.decompress(
        (ROOT / "src/mobilellm/sample/tiny_shakespeare.txt.gz").read_bytes()
    ).decode()[:80_000]
    speeches = text.split("\n\n")
    half = len(speeches) // 2
    sources = []
    for name, part in (("first", speeches[:half]), ("second", speeches[half:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": speech}) + "\n" for speech in part))
        sources.append(Source(name, [path]))
    prepare(sources, folder / "data", vocab_size=300, held_out=0.1)
    return folder / "data"


def settings(name: str) -> dict[str, dict[str, Any]]:
    """The recipe of a case, as TOML has it, without its data's path."""
    sections = BASE.keys() | CASES[name].keys()
    return {
        section: BASE.get(section, {}) | CASES[name].get(section, {})
        for section in sorted(sections)
    }


def run_case(name: str, data: Path, run: Path) -> dict[str, Any]:
    """Train a case in the folder `run`; returns what is kept of it."""
    import torch

    from mobilellm.recipe.recipe import Recipe
    from mobilellm.train.start import train

    values = settings(name)
    threads = torch.get_num_threads()
    try:
        train(run, Recipe.from_dict(values | {"data": values["data"] | {"path": str(data)}}))
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "learning_rates": [row["learning_rate"] for row in rows],
        "held_out_losses": [row["held_out_loss"] for row in rows if "held_out_loss" in row],
    }


def machine() -> dict[str, str]:
    """What decides the last bits of a float32 sum: the processor, to its flags, and torch."""
    import torch

    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags")
    try:
        lines = [
            line.split(":", 1)
            for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        ]
        facts = {key.strip(): value.strip() for key, value in lines if key.strip() in wanted}
    except (OSError, ValueError):
        facts = {"processor": platform.processor(), "machine": platform.machine()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return {"processor": digest, "torch": torch.__version__.split("+")[0]}


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware: elsewhere the case takes minutes and
    means nothing."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})
