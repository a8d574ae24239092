"""How cost grows: the exponents of time and memory in everything that can grow, beside theory's.

    python benchmarks/growth.py --save benchmarks/results/growth.json
    python benchmarks/growth.py --only sequence_length prepare   # with --save, today's others stay
    python benchmarks/growth.py --smoke                          # the same, tiny

Each point is measured in a process of its own with one thread, and the points of a series take
turns. Time is the processor time of that process, which depends little on what else the machine
does; memory is its peak over what it held before. The exponent is the slope of the logarithms over
the upper half of the points, where what does not grow counts least: 1 is linear, 0 is flat. Theory
is the exponent of the largest term in what has to be done; a series whose exponent is more than 0.1
above it is said to be.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.jobs.pool import ONE_THREAD_TOKENIZERS

os.environ |= ONE_THREAD_TOKENIZERS
TOLERANCE = 0.1
"""Of an exponent over theory's: what repeated runs of one series differ by."""
MIN_SECONDS = 0.3
"""Of the steps that a point is the best of, beside the one that warms up."""
WORDS = 4096  # in the vocabulary of the prepared text

Cost = tuple[float, int]
"""Seconds of processor time, and bytes."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One thing that grows."""

    title: str
    unit: str
    points: tuple[int, ...]
    smoke: tuple[int, ...]
    time: float
    """Theory's exponent of time."""
    memory: float
    """Theory's exponent of memory."""
    measure: Callable[[int, Path], Cost]
    """What one point costs; the folder has text and data."""


def step_cost(
    length: int = 512,
    rows: int = 1,
    layers: int = 4,
    vocabulary: int = 1024,
    documents: int = 0,
) -> Cost:
    """A training step of a network of the 1M preset's width, as `mobilellm train` makes it without
    a compiler. `documents` divides each row into as many, which do not see each other."""
    import torch

    from mobilellm.distributed.world import World
    from mobilellm.hardware.allocator import keep_freed_memory
    from mobilellm.model.config import ModelConfig
    from mobilellm.model.network import Network
    from mobilellm.recipe.recipe import Recipe
    from mobilellm.train.step import TrainStep

    keep_freed_memory()
    owner = torch.arange(length) * documents // length

    def make(length: int, rows: int, layers: int, vocabulary: int) -> Callable[[], None]:
        config = ModelConfig.preset(
            "1M",
            vocab_size=vocabulary,
            num_hidden_layers=layers,
            max_position_embeddings=length,
        )
        recipe = Recipe()
        recipe = recipe.replace("data", sequence_length=length, mask_documents=documents > 0)
        recipe = recipe.replace(
            "train",
            batch_tokens=length * rows,
            micro_batch_size=rows,
            precision="fp32",
            compile="off",
            products="torch",
        )
        torch.manual_seed(0)
        ids = torch.randint(0, vocabulary, (rows, length + 1))
        of = owner[:length].expand(rows, length).contiguous() if documents else None
        step = TrainStep(Network(config), recipe, World(device=torch.device("cpu")))

        def work() -> None:
            step.update(0, step.forward_backward(ids[:, :-1], ids[:, 1:], of))

        return work

    make(8, 1, 1, 64)()  # what is imported and set up at the first step is no part of it
    return best(lambda: make(length, rows, layers, vocabulary), lambda work: work())


def best(set_up: Callable[[], Any], work: Callable[[Any], None]) -> Cost:
    """The least processor time of `work`, once warm, and what it and its set-up hold at most."""
    from mobilellm.budget import held
    from mobilellm.hardware.device_memory import forget_peak, peak_memory
    from mobilellm.hardware.probes import pick_device

    forget_peak()
    before = held()
    ready = set_up()
    work(ready)
    taken: list[float] = []
    while sum(taken) < MIN_SECONDS:
        start = time.process_time()
        work(ready)
        taken.append(time.process_time() - start)
    return min(taken), max(0, peak_memory(pick_device()) - before)


def fetch_cost(sources: int, folder: Path) -> Cost:
    """A batch of 64 samples of a mixture of as many sources, with the opening of the data in its
    memory."""
    from mobilellm.data.loader import DataState
    from mobilellm.recipe.recipe import Recipe
    from mobilellm.train.inputs import batches, open_data

    data = folder / f"sources-{sources}"
    if not data.exists():
        mixture(sources, folder, data)
    recipe = Recipe().replace("data", path=str(data), sequence_length=64)
    recipe = recipe.replace("train", batch_tokens=64 * 64, micro_batch_size=64)

    def opened() -> Any:
        found = open_data(recipe)
        state = DataState(seed=0, epoch=0, samples=0, fingerprint=found.fingerprint)
        return iter(batches(recipe, found, state, rank=0, world_size=1))

    return best(opened, next)


def mixture(sources: int, folder: Path, out: Path) -> None:
    """The sample text as a token folder of as many sources, of one weight each."""
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source
    from mobilellm.tokenizer.tokenizer import Tokenizer

    text, parts = sample_text(), []
    for number in range(sources):
        path = folder / f"part-{sources}-{number}.txt"
        path.write_text(text[number * len(text) // sources : (number + 1) * len(text) // sources])
        parts.append(Source(f"part{number}", [path], weight=1.0))
    prepare(parts, out, tokenizer=Tokenizer.load(folder / "tokenizer"), held_out=0.01, workers=1)


def prepare_cost(megabytes: int, folder: Path) -> Cost:
    """`prepare` in one process, of as many megabytes of text in one gzipped file of JSON lines."""
    from mobilellm.budget import held
    from mobilellm.hardware.device_memory import forget_peak, peak_memory
    from mobilellm.hardware.probes import pick_device
    from mobilellm.prepare.prepare import prepare
    from mobilellm.prepare.sources import Source
    from mobilellm.tokenizer.tokenizer import Tokenizer

    file = write_text(folder, megabytes)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    few, out = Source("few", [write_text(folder, 0)]), Path(tempfile.mkdtemp(dir=folder))
    prepare([few], out / "few", tokenizer=tokenizer, workers=1)  # what is set up at first use
    forget_peak()
    before, start = held(), time.process_time()
    prepare([Source("text", [file])], out / "all", tokenizer=tokenizer, workers=1)
    return time.process_time() - start, max(0, peak_memory(pick_device()) - before)


def sample_text() -> str:
    """The text that is shipped."""
    import mobilellm

    sample = Path(mobilellm.__file__).parent / "sample/tiny_shakespeare.txt.gz"
    return gzip.decompress(sample.read_bytes()).decode()


def write_text(folder: Path, megabytes: int, number: int = 0) -> Path:
    """Documents of two thousand characters, each lines of the sample text in another order; the
    smallest file has ten. Files of another `number` have others."""
    path = folder / f"text-{megabytes}-{number}.jsonl.gz"
    if path.exists():
        return path
    lines, draw, size = sample_text().splitlines(), random.Random(number), 0
    with gzip.open(path, "wt", compresslevel=1) as file:
        while size < max(20_000, megabytes * 1_000_000):
            start = draw.randrange(len(lines) - 60)
            chosen = lines[start : start + 60]
            draw.shuffle(chosen)
            text = "\n".join(chosen)
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
    return path


def lab_cost(cells: int, folder: Path) -> Cost:
    """The plan of a lab with as many cells, which measures each by a few steps."""
    from mobilellm.budget import held
    from mobilellm.hardware.device_memory import forget_peak, peak_memory
    from mobilellm.hardware.probes import pick_device
    from mobilellm.lab.lab_file import LabFile
    from mobilellm.lab.plan import make_plan

    data = folder / "sources-1"
    if not data.exists():
        mixture(1, folder, data)

    def lab(count: int) -> LabFile:
        recipe = {
            "model": {"preset": "1M", "override": {"num_hidden_layers": 1}},
            "data": {"sequence_length": 64},
            "train": {"steps": 1000, "batch_tokens": 512, "precision": "fp32"},
        }
        rates = tuple(1e-3 + 1e-5 * number for number in range(count))
        return LabFile(title="growth", recipe=recipe, axes={"optimizer.learning_rate": rates})

    forget_peak()
    before = held()
    make_plan(lab(1), data, seeds=1)  # what is set up at first use takes time once, and stays
    start = time.process_time()
    make_plan(lab(cells), data, seeds=1)
    return time.process_time() - start, max(0, peak_memory(pick_device()) - before)


SERIES: Mapping[str, Series] = {
    "sequence_length": Series(
        title="a step of one row, by its length", unit="tokens",
        points=(128, 256, 512, 1024, 2048, 4096, 8192), smoke=(16, 32, 64),
        time=2, memory=1, measure=lambda x, _: step_cost(length=x),
    ),
    "rows": Series(
        title="a step, by its rows of 512 tokens", unit="rows",
        points=(1, 2, 4, 8, 16), smoke=(1, 2, 4),
        time=1, memory=1, measure=lambda x, _: step_cost(rows=x, length=512),
    ),
    "layers": Series(
        title="a step of 2 x 512 tokens, by layers", unit="layers",
        points=(2, 4, 8, 16, 32), smoke=(1, 2, 4),
        time=1, memory=1, measure=lambda x, _: step_cost(layers=x, rows=2),
    ),
    "vocabulary": Series(
        title="a step of 2 x 512 tokens, by vocabulary", unit="words",
        points=(1024, 2048, 4096, 8192, 16384, 32768), smoke=(256, 512, 1024),
        time=1, memory=1, measure=lambda x, _: step_cost(vocabulary=x, rows=2),
    ),
    "documents": Series(
        title="a step of 2 x 2,048 tokens, by documents a row", unit="documents",
        points=(1, 4, 16, 64, 256), smoke=(1, 2, 4),
        time=0, memory=0, measure=lambda x, _: step_cost(length=2048, rows=2, documents=x),
    ),
    "sources": Series(
        title="a batch of 64 samples, by sources of the mixture", unit="sources",
        points=(1, 2, 4, 8, 16, 32, 64), smoke=(1, 2, 4),
        time=1, memory=1, measure=fetch_cost,
    ),
    "prepare": Series(
        title="text to a token folder, by its size", unit="MB",
        points=(4, 16, 64, 128, 256), smoke=(1, 2, 4),
        time=1, memory=0, measure=prepare_cost,
    ),
    "lab": Series(
        title="the plan of a lab, by its cells", unit="cells",
        points=(1, 2, 4, 8), smoke=(1, 2, 4),
        time=1, memory=0, measure=lab_cost,
    ),
}  # fmt: skip


def exponent(points: Mapping[int, float]) -> float:
    """The slope of log y over log x by least squares, over the upper half of the points and three
    at least."""
    found = sorted(points.items())[-max(3, -(-len(points) // 2)) :]
    x, y = (np.log(np.maximum(column, 1e-12)) for column in zip(*found, strict=True))
    return float(np.polyfit(x, y, 1)[0])


def fitted(series: Series, points: list[dict[str, Any]]) -> dict[str, Any]:
    """A series with its exponents, and whether none is above theory's."""
    found: dict[str, Any] = {"title": series.title, "unit": series.unit, "points": points}
    for key, of, theory in (("seconds", "time", series.time), ("bytes", "memory", series.memory)):
        slope = exponent({point["x"]: point[key] for point in points})
        found |= {f"{of}_exponent": slope, f"{of}_theory": theory}
        found[f"{of}_holds"] = slope <= theory + TOLERANCE
    return found


def measured(name: str, points: tuple[int, ...], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """The points of one series, each in a process of its own that has all modules already, in
    turns."""
    fork, found = multiprocessing.get_context("fork"), {x: list[Cost]() for x in points}
    for _ in range(rounds):
        for x in points:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_point, args=(sender, name, x, folder))
            process.start()
            sender.close()
            try:
                found[x].append(receiver.recv())
            except EOFError:
                raise SystemExit(f"{name} at {x}: its process ended") from None
            process.join()
    return [
        {"x": x, "seconds": min(s for s, _ in costs), "bytes": min(b for _, b in costs)}
        for x, costs in found.items()
    ]


def _point(sender: Any, name: str, x: int, folder: Path) -> None:
    sender.send(SERIES[name].measure(x, folder))


def line_of(row: dict[str, Any]) -> str:
    """A series as a line of the table."""
    first, last = row["points"][0], row["points"][-1]
    exponents = "".join(
        f"{row[f'{of}_exponent']:>9.2f}{row[f'{of}_theory']:>4g}"
        f"{'' if row[f'{of}_holds'] else '!':1}"
        for of in ("time", "memory")
    )
    span = f"{first['x']:,} to {last['x']:,} {row['unit']}"
    size = f"{last['seconds']:>9.3f} s {last['bytes'] / 2**20:>8,.0f} MiB"
    return f"{row['title']:52}{span:26}{exponents}{size}"


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SERIES), help="these series")
    parser.add_argument("--rounds", type=int, default=2, help="of each series")
    parser.add_argument("--smoke", action="store_true", help="three small points of each, once")
    parser.add_argument("--save", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    import torch

    import mobilellm.lab.plan  # noqa: F401  (all that the points need, imported once)
    from mobilellm.hardware.description import describe
    from mobilellm.tokenizer.tokenizer import train_bpe

    torch.set_num_threads(1)  # before anything is computed: a pool of threads does not outlive fork

    machine = {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}")
    print(f"{'':78}{'time':>9}{'':5}{'memory':>9}{'':5}{'at the last':>14}")
    found = {}
    for name in arguments.only or SERIES:
        series = SERIES[name]
        points = series.smoke if arguments.smoke else series.points
        with tempfile.TemporaryDirectory(prefix="growth-") as scratch:
            folder = Path(scratch)
            if name in ("sources", "prepare", "lab"):
                train_bpe([sample_text()], WORDS).save(folder / "tokenizer")
            rounds = 1 if arguments.smoke else arguments.rounds
            found[name] = fitted(series, measured(name, points, rounds, folder))
        print(line_of(found[name]), flush=True)
    above = [name for name, row in found.items() if not (row["time_holds"] and row["memory_holds"])]
    print(f"above theory: {', '.join(above) or 'none'}")
    if arguments.save:
        record = {
            "benchmark": "growth",
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "rounds": 1 if arguments.smoke else arguments.rounds,
            "series": kept(arguments.save, machine) | found,
        }
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


def kept(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The series that were saved earlier on this day and machine."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    same = before["machine"]["device"] == machine["device"]
    today = before["date"] == datetime.date.today().isoformat()
    return dict(before["series"]) if same and today else {}


if __name__ == "__main__":
    main()
