"""Preparation against amber-data-prep's way and datatrove's DocumentTokenizer, and by the size of
its input; the loader; a trillion tokens' start-up.

    python benchmarks/prepare.py TEXT/*.jsonl.gz --tokenizer TOKENIZER

Prints each figure and writes benchmarks/results/prepare.json. All in one run: every contender reads
the same files, with the same tokenizer and the same number of processes. amber-data-prep's way is
written here from its description: a Hugging Face fast tokenizer in worker processes, ids joined
behind an EOS each, cut into samples of 2,049 ids, written as JSON lines.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilellm.data.loader import DataState, Loader
from mobilellm.data.token_folder import TokenFolder
from mobilellm.hardware.description import describe
from mobilellm.jobs.pool import ONE_THREAD_TOKENIZERS
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.tokenizer.encoder import Encoder, choose
from mobilellm.tokenizer.tokenizer import Tokenizer

ROW = 2049
SIZES = (10, 100, 400)  # megabytes of text in one gzip
BATCH = 100  # documents that the Hugging Face tokenizer is given at once
SHARD = 1 << 27
TRILLION = 10**12

Contender = Callable[[list[Path], Path, Path, int], int]
"""(files, tokenizer, out, workers) -> a count"""


def texts_of(path: Path) -> Any:
    with gzip.open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def amber_worker(task: tuple[str, str, str]) -> int:
    """One file to samples: returns its tokens."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import PreTrainedTokenizerFast

    source, folder, tokenizer_folder = task
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    name, tokens, held, texts = Path(source).name.split(".")[0], 0, list[int](), list[str]()
    with open(Path(folder) / f"{name}.jsonl", "w") as out:

        def write() -> None:
            nonlocal tokens, held
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
                held.extend(ids)
                held.append(tokenizer.eos_token_id)
                tokens += len(ids) + 1
            texts.clear()
            whole = len(held) // ROW * ROW
            for start in range(0, whole, ROW):
                out.write(
                    json.dumps({"token_ids": held[start : start + ROW], "source": name}) + "\n"
                )
            held = held[whole:]

        for text in texts_of(Path(source)):
            texts.append(text)
            if len(texts) >= BATCH:
                write()
        write()
    return tokens


def amber(files: list[Path], tokenizer: Path, out: Path, workers: int) -> int:
    """amber-data-prep's way."""
    out.mkdir()
    tasks = sorted(
        ((str(f), str(out), str(tokenizer)) for f in files), key=lambda t: -os.path.getsize(t[0])
    )
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sum(pool.imap_unordered(amber_worker, tasks))


def datatrove(files: list[Path], tokenizer: Path, out: Path, workers: int) -> int:
    """datatrove's own tokenizing pipeline, in its local executor."""
    program = (
        "import sys\nfrom datatrove.executor import LocalPipelineExecutor\nfrom "
        "datatrove.pipeline.readers import JsonlReader\n"
        "from datatrove.pipeline.tokens import DocumentTokenizer\n"
        "if __name__ == '__main__':\n"
        "    folder, tokenizer, out, workers, tasks, eos = sys.argv[1:]\n"
        "    LocalPipelineExecutor(pipeline=[JsonlReader(folder, glob_pattern='*.jsonl.gz'),\n"
        "        DocumentTokenizer(out + '/tokens', tokenizer_name_or_path=tokenizer, "
        "eos_token=eos,\n"
        "        shuffle_documents=False)],\n"
        "        tasks=int(tasks), workers=int(workers), logging_dir=out + '/logs').run()\n"
    )
    loaded = Tokenizer.load(tokenizer)
    out.mkdir()
    (out / "in").mkdir()
    for file in files:
        (out / "in" / file.name).symlink_to(file.resolve())
    (out / "run.py").write_text(program)
    arguments = [
        str(out / "in"),
        str(tokenizer / "tokenizer.json"),
        str(out),
        str(workers),
        str(len(files)),
        str(loaded.token(loaded.eos_id)),
    ]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, str(out / "run.py"), *arguments],
        check=True,
        capture_output=True,
        env=environment,
    )
    return sum(path.stat().st_size for path in (out / "tokens").glob("*.ds")) // 2


def run(files: list[Path], tokenizer: Path, out: Path, workers: int) -> int:
    """`mobilellm prepare`, as a process of its own like the others' workers; a single worker has a
    single core. Returns the KiB of memory that it, or the largest of its own workers, took at
    most."""
    arguments = [
        sys.executable,
        "-m",
        "mobilellm",
        "prepare",
        *map(str, files),
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        str(workers),
    ]
    cores = sorted(os.sched_getaffinity(0))[:workers]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            arguments,
            stdout=said,
            stderr=said,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace"))
    return usage.ru_maxrss


def ours(files: list[Path], tokenizer: Path, out: Path, workers: int) -> int:
    """`mobilellm prepare`; returns its tokens."""
    run(files, tokenizer, out, workers)
    manifest = json.loads((out / "manifest.json").read_text())
    return sum(split["tokens"] for split in manifest["splits"].values())


def timed(
    contender: Contender, files: list[Path], tokenizer: Path, out: Path, workers: int
) -> tuple[float, int]:
    """Seconds of one turn, and what it returns; what it wrote is gone."""
    start = time.perf_counter()
    found = contender(files, tokenizer, out, workers)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds, found


def throughput(files: list[Path], tokenizer: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """MB/s of text of each contender, the best of `rounds`."""
    size = sum(len(text.encode()) for file in files for text in texts_of(file))
    contenders: list[tuple[str, Contender, int, int]] = [
        ("ours_1_worker", ours, 1, rounds),
        ("ours_2_workers", ours, 2, rounds),
        ("amber_data_prep_way_2_workers", amber, 2, 1),
        ("datatrove_2_workers", datatrove, 2, 1),
    ]
    found: dict[str, Any] = {"text_bytes": size, "files": [file.name for file in files]}
    for name, contender, workers, times in contenders:
        best, tokens = float("inf"), 0
        for number in range(times):
            out = scratch / f"{name}-{number}"
            seconds, tokens = timed(contender, files, tokenizer, out, workers)
            best = min(best, seconds)
        found[name] = {"seconds": best, "megabytes_per_second": size / best / 1e6, "tokens": tokens}
        print(
            f"{name:32} {size / best / 1e6:7.1f} MB/s  {tokens / best / 1e6:6.2f} Mtok/s  "
            f"{tokens:,} tokens",
            flush=True,
        )
    mine = found["ours_2_workers"]["megabytes_per_second"]
    for name in ("amber_data_prep_way_2_workers", "datatrove_2_workers"):
        found[f"times_{name}"] = mine / found[name]["megabytes_per_second"]
    found["two_workers_over_one"] = mine / found["ours_1_worker"]["megabytes_per_second"]
    return found


def write_size(files: list[Path], megabytes: int, path: Path) -> int:
    """One gzip of JSON lines with this much text, of documents of all files in turns, which begin
    again where they end; returns the bytes of text."""
    size, limit = 0, megabytes * 10**6
    sources = [itertools.chain.from_iterable(map(texts_of, itertools.repeat(f))) for f in files]
    turns = itertools.cycle(sources)
    with gzip.open(path, "wb", compresslevel=1) as out:
        while size < limit:
            text = next(next(turns))
            size += len(text.encode())
            out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return size


def encoder_speed(texts: list[str], folder: Path) -> float:
    """Megabytes of text a second that the encoder alone gives here."""
    tokenizer = Tokenizer.load(folder)
    encoder = Encoder(tokenizer, choose(tokenizer)[0])
    encoder.batch(texts[:9])
    start = time.perf_counter()
    encoder.batch(texts)
    seconds = time.perf_counter() - start
    return sum(len(text.encode()) for text in texts) / 1e6 / seconds


def encoder_worker(task: tuple[str, str]) -> float:
    """`encoder_speed` on one thread, of a file's texts."""
    os.environ |= ONE_THREAD_TOKENIZERS
    source, folder = task
    return encoder_speed(list(texts_of(Path(source))), Path(folder))


def by_size(files: list[Path], tokenizer: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one and of two workers on one file of each size, best of `rounds`, and how much
    memory the largest process takes; and what the encoder alone allows, on one core and two."""
    points = []
    for megabytes in SIZES:
        path = scratch / f"{megabytes}.jsonl.gz"
        size = write_size(files, megabytes, path)
        point: dict[str, Any] = {"text_bytes": size}
        peak = 0
        for _, workers in itertools.product(range(rounds), (1, 2)):
            key = f"seconds_{workers}_workers"
            seconds, memory = timed(run, [path], tokenizer, scratch / "sized", workers)
            point[key] = min(seconds, point.get(key, seconds))
            peak = max(peak, memory)
        point |= {
            "megabytes_per_second": size / point["seconds_2_workers"] / 1e6,
            "two_workers_over_one": point["seconds_1_workers"] / point["seconds_2_workers"],
            "peak_memory_megabytes": peak / 1024,
        }
        points.append(point)
        print(json.dumps(point), flush=True)
    task = (str(scratch / f"{SIZES[1]}.jsonl.gz"), str(tokenizer))
    alone = {}
    for workers in (1, 2):
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            alone[f"encoder_alone_{workers}"] = sum(pool.map(encoder_worker, [task] * workers, 1))
    return {"points": points} | alone


def tokens_per_second(loader: Loader, seconds: float = 3.0) -> float:
    """Through one iterator, after a moment's warming up."""
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batch, _ = next(batches)
        tokens += batch.inputs.size
    return tokens / (time.perf_counter() - start)


def loading(files: list[Path], tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """Tokens a second of the loader, from shards and from JSON lines, against json.loads of each
    line."""
    from mobilellm.data.dataset import open_dataset

    sources = [Source("text", files)]
    loaded = Tokenizer.load(tokenizer)
    prepare(sources, scratch / "shards", tokenizer=loaded)
    prepare(sources, scratch / "layout", tokenizer=loaded, nodes=2)
    found: dict[str, Any] = {}
    state = DataState(seed=0, epoch=0, samples=0, fingerprint="")
    stream = TokenFolder.open(scratch / "shards").tokens("train")
    for length in (256, 2048):
        found[f"shards_tokens_per_second_sequence_{length}"] = tokens_per_second(
            Loader(stream, length, 64, state)
        )
    masked = Loader(stream, 2048, 64, state, mask_documents=True)
    found["shards_tokens_per_second_sequence_2048_with_documents"] = tokens_per_second(masked)
    start, tokens = time.perf_counter(), 0
    for path in sorted((scratch / "layout").glob("[0-9]*/*.jsonl")):
        with open(path) as file:
            for line in file:
                tokens += len(json.loads(line)["token_ids"])
    found["json_loads_tokens_per_second"] = tokens / (time.perf_counter() - start)
    start = time.perf_counter()
    rows = open_dataset(scratch / "layout")
    found["layout_first_opening_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    rows = open_dataset(scratch / "layout")
    found["layout_later_opening_seconds"] = time.perf_counter() - start
    found["layout_tokens_per_second"] = tokens_per_second(
        Loader(rows.tokens("train"), 2048, 64, state)
    )
    found["layout_over_json_loads"] = (
        found["layout_tokens_per_second"] / found["json_loads_tokens_per_second"]
    )
    return found


def sparse_folder(folder: Path, like: Path, total: int = TRILLION) -> Path:
    """A token folder of `total` zeros in files that take no room."""
    from mobilellm.data.manifest import fingerprint
    from mobilellm.data.shard_file import ENDS, HEADER_BYTES
    from mobilellm.data.shard_file import header as npy_header

    manifest = json.loads((like / "manifest.json").read_text())
    shutil.copytree(like / "tokenizer", folder / "tokenizer")
    dtype = np.dtype(manifest["dtype"])
    documents = SHARD // 1000
    for split, tokens in (("train", total), ("held_out", SHARD)):
        (folder / split).mkdir()
        shards = []
        for number, start in enumerate(range(0, tokens, SHARD)):
            count = min(SHARD, tokens - start)
            name = folder / split / f"{manifest['sources'][0]['name']}-{number:05d}.npy"
            for path, kind, n in (
                (name, dtype, count),
                (name.with_suffix(".ends.npy"), ENDS, documents),
            ):
                with open(path, "wb") as file:
                    head = npy_header(kind, n)
                    file.write(head)
                    file.truncate(HEADER_BYTES + n * kind.itemsize)
            shards.append(
                {
                    "file": f"{split}/{name.name}",
                    "source": manifest["sources"][0]["name"],
                    "tokens": count,
                    "documents": documents,
                    "bytes": 4 * count,
                    "size": name.stat().st_size,
                    "sha256": "0" * 64,
                    "ends_size": HEADER_BYTES + documents * 8,
                    "ends_sha256": "0" * 64,
                }
            )
        manifest["splits"][split] = {
            key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")
        } | {"shards": shards}
    manifest["fingerprint"] = fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def start_up(folder: Path) -> dict[str, Any]:
    """In a process of its own: seconds until the first batch, its memory, and the time of samples
    anywhere."""
    program = (
        "import json, sys, time\nfrom pathlib import Path\nimport numpy as np\n"
        "from mobilellm.data.dataset import open_dataset\nfrom mobilellm.data.loader import "
        "DataState, Loader\n"
        "start = time.perf_counter()\ndata = open_dataset(Path(sys.argv[1]))\nstream = "
        "data.tokens('train')\n"
        "loader = Loader(stream, 2048, 8, DataState(seed=0, epoch=0, samples=0, "
        "fingerprint=data.fingerprint))\n"
        "next(iter(loader))\n"
        "first = time.perf_counter() - start\ntimes = []\n"
        "for i in np.random.default_rng(0).integers(0, loader.samples_per_epoch, 2000):\n"
        "    at = time.perf_counter()\n    loader.samples.gather(loader.starts(0, np.array([i])))\n"
        "    times.append(time.perf_counter() - at)\n"
        "print(json.dumps({'tokens': len(stream), 'seconds_to_first_batch': first,\n"
        "    'peak_memory_megabytes': "
        "int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024,\n"
        "    'sample_milliseconds_mean': 1e3 * sum(times) / len(times), "
        "'sample_milliseconds_worst': 1e3 * max(times),\n"
        "    'sample_milliseconds_99': 1e3 * sorted(times)[-len(times) // 100]}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    """Run all, print, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl.gz with a text field")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2, help="of ours; the others run once")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/prepare.json")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prepare-benchmark-") as folder:
        scratch = Path(folder)
        tokenizer = scratch / "tokenizer"
        Tokenizer.load(chosen.tokenizer).save(tokenizer)
        result: dict[str, Any] = {
            "benchmark": "prepare",
            "date": datetime.date.today().isoformat(),
            "machine": {k: v for k, v in describe(torch.device("cpu")).items() if k != "command"}
            | {"cores": len(os.sched_getaffinity(0))},
            "versions": {
                name: metadata.version(name)
                for name in ("tokenizers", "fastokens", "datatrove", "transformers", "numpy")
            },
            "tokenizer": chosen.tokenizer.name,
        }
        for name, part in (
            ("loader", lambda: loading(chosen.files, tokenizer, scratch)),
            (
                "trillion_tokens",
                lambda: start_up(sparse_folder(scratch / "sparse", scratch / "shards")),
            ),
            ("end_to_end", lambda: throughput(chosen.files, tokenizer, scratch, chosen.rounds)),
            ("by_size", lambda: by_size(chosen.files, tokenizer, scratch, chosen.rounds)),
        ):
            result[name] = part()
            print(name, json.dumps(result[name], indent=1), flush=True)
    chosen.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
