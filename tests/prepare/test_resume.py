"""A run that is killed goes on; how many processes there are changes nothing; what cannot be
read is named or counted."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.jobs.pool import ONE_THREAD
from mobilellm.prepare import task_run, tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.readers import text as text_reader
from mobilellm.streams import compression
from mobilellm.tokenizer import encoder as encoding
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

SCRIPT = """
import os, sys
from pathlib import Path
from mobilellm.prepare import tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import parse_sources
from mobilellm.tokenizer.tokenizer import Tokenizer
tasks.MIN_BYTES = int(os.environ.get("MIN_BYTES", 30_000))
out, workers, *named = sys.argv[1:]
tokenizer = Tokenizer.load(Path("tokenizer"))
sources = parse_sources([], named)
prepare(sources, Path(out), tokenizer=tokenizer, workers=int(workers), held_out=0.05)
"""


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture
def corpus(tmp_path: Path, sample_text: str) -> Path:
    """Three sources, of every way of dividing a file, and a tokenizer."""
    texts = [sample_text[i : i + 900] for i in range(0, 600_000, 900)]
    lines(tmp_path / "plain.jsonl", texts[:300])
    (tmp_path / "many").mkdir()
    for i, text in enumerate(texts[300:350]):
        (tmp_path / f"many/{i:02d}.txt").write_text(text)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as file:
        file.write(lines(tmp_path / "tmp", texts[350:]).read_bytes())
    train_bpe([sample_text[:100_000]], 500).save(tmp_path / "tokenizer")
    return tmp_path


NAMED = ["a=plain.jsonl", "b=many", "c=packed.jsonl.gz"]


def start(
    corpus: Path, out: str, workers: int, task_bytes: int = 30_000
) -> subprocess.Popen[bytes]:
    environment = os.environ | {"MIN_BYTES": str(task_bytes)}
    arguments = [sys.executable, "-c", SCRIPT, out, str(workers), *NAMED]
    return subprocess.Popen(arguments, cwd=corpus, stderr=subprocess.PIPE, env=environment)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus: Path) -> None:
    for workers in (1, 2, 5):
        assert start(corpus, f"out{workers}", workers).wait() == 0
    one = content(corpus / "out1")
    assert len([name for name in one if name.startswith("train/") and ".ends" not in name]) > 10
    assert content(corpus / "out2") == one
    assert content(corpus / "out5") == one
    assert not list(corpus.glob("*.preparing"))


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(corpus: Path) -> None:
    assert start(corpus, "whole", 2, task_bytes=5000).wait() == 0
    rng = random.Random(0)
    work = corpus / "out.preparing/tasks"
    inodes: dict[str, int] = {}
    kills = before_kill = 0
    for _ in range(12):
        run = start(corpus, "out", 2, task_bytes=5000)
        wanted = before_kill + rng.randint(1, 3)
        deadline = time.time() + 60
        while run.poll() is None and time.time() < deadline:
            done = (
                [
                    path
                    for path in work.glob("*/result.json")
                    if not path.parent.name.startswith(".")
                ]
                if work.is_dir()
                else []
            )
            if len(done) >= wanted:
                break
            time.sleep(0.001)
        if run.poll() is not None:
            break
        time.sleep(rng.random() * 0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills, before_kill = kills + 1, len(list(work.glob("[0-9a-f]*"))) if work.is_dir() else 0
        assert not (corpus / "out").exists() or (corpus / "out/manifest.json").exists()
        for path in work.glob("[0-9a-f]*/train/*.npy") if work.is_dir() else []:
            before = inodes.setdefault(f"{path.parent.parent.name}/{path.name}", path.stat().st_ino)
            assert before == path.stat().st_ino, "a finished task was done again"
    assert kills >= 3
    if run.returncode:
        run = start(corpus, "out", 2, task_bytes=5000)
    assert run.wait() == 0
    assert content(corpus / "out") == content(corpus / "whole")
    final = {path.stat().st_ino for path in (corpus / "out/train").iterdir()}
    assert set(inodes.values()) <= final
    assert not list(corpus.glob(".out*"))


def test_a_worker_ends_with_its_standard_input(corpus: Path) -> None:
    """As when the run that started it is killed; also in the middle of a task, and with nothing
    to do."""
    (task,) = tasks.plan([Source("a", [corpus / "plain.jsonl"])])
    job = tasks.Job(
        tokenizer=str(corpus / "tokenizer"),
        tokenizer_sha256="",
        library="tokenizers",
        library_version="",
        bos=False,
        eos=True,
        split=SplitRule(rule="documents", fraction=0.1, seed=0),
        text_field="text",
        sequence_length=8,
        on_bad="stop",
    )
    message = {
        "function": "mobilellm.prepare.task_run:tokenize",
        "job": asdict(job),
        "task": asdict(task),
        "key": "k",
        "folder": str(corpus),
    }
    for given in (b"", json.dumps(message).encode() + b"\n"):
        worker = subprocess.Popen(
            [sys.executable, "-m", "mobilellm.jobs.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert worker.stdin is not None
        worker.stdin.write(given)
        worker.stdin.close()
        assert worker.wait(timeout=20) == 0


def test_two_runs_into_one_folder(corpus: Path) -> None:
    import fcntl

    (corpus / "out.preparing").mkdir()
    with open(corpus / "out.preparing/lock", "w") as file:
        file.write("process 77\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"out: another process \(process 77\) is preparing it"):
            prepare([Source("a", [corpus / "plain.jsonl"])], corpus / "out", vocab_size=300)
    prepare([Source("a", [corpus / "plain.jsonl"])], corpus / "out", vocab_size=300)


def test_what_was_finished_before_a_fault_is_kept(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MIN_BYTES", 30_000)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    bad = corpus / "bad.jsonl"
    bad.write_text('{"text": "good"}\n' * 2 + '{"text": \n')
    sources = [Source("a", [corpus / "plain.jsonl"]), Source("z", [bad])]
    with pytest.raises(UserError, match=r"bad\.jsonl:3: broken JSON"):
        prepare(sources, corpus / "out", tokenizer=tokenizer, held_out=0.05)
    kept = {p.name: p.stat().st_ino for p in (corpus / "out.preparing/tasks").iterdir()}
    assert len(kept) > 5
    done: list[float] = []
    bad.write_text('{"text": "good"}\n' * 3)
    prepare(
        sources,
        corpus / "out",
        tokenizer=tokenizer,
        held_out=0.05,
        progress=lambda d, t: done.append(d / t),
    )
    assert done[0] > 0.9  # of the work was there already


def test_other_settings_take_nothing_over(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = tasks.plan([Source("a", [corpus / "plain.jsonl"])])
    base = {
        "tokenizer": "t",
        "tokenizer_sha256": "x",
        "library": "tokenizers",
        "library_version": "1",
        "bos": False,
        "eos": True,
        "split": SplitRule(rule="documents", fraction=0.1, seed=0),
        "text_field": "text",
        "sequence_length": 8,
        "on_bad": "stop",
    }
    keys = {tasks.Job(**base).key(task)}
    for change in (
        {"bos": True},
        {"tokenizer_sha256": "y"},
        {"text_field": "t"},
        {"library": "fastokens"},
        {"on_bad": "skip"},
        {"split": SplitRule(rule="documents", fraction=0.1, seed=1)},
    ):
        keys.add(tasks.Job(**base | change).key(task))
    os.utime(corpus / "plain.jsonl")
    keys.add(tasks.Job(**base).key(tasks.plan([Source("a", [corpus / "plain.jsonl"])])[0]))
    assert len(keys) == 8


def test_a_worker_that_is_killed_is_named(corpus: Path) -> None:
    run = start(corpus, "out", 2)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    pids: list[str] = []
    while not pids and run.poll() is None:
        pids = children.read_text().split() if children.exists() else []
    if not pids:
        pytest.skip("no /proc to see processes in")
    os.kill(int(pids[0]), signal.SIGKILL)
    assert b"a worker process ended" in run.communicate()[1]


def test_wrong_ids_of_the_fast_library_are_found_and_it_is_given_up(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastokens")
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    sources = [Source("a", [corpus / "plain.jsonl"])]
    right = prepare(sources, corpus / "right", tokenizer=tokenizer)
    reference = prepare(sources, corpus / "reference", tokenizer=tokenizer, library="tokenizers")
    assert right["encoder"]["library"].startswith("fastokens")
    assert right["encoder"]["documents_verified"] >= 4
    assert right["fingerprint"] == reference["fingerprint"]
    real = encoding.Encoder.batch

    def wrong(self: encoding.Encoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = real(self, texts)
        if (
            self.library == encoding.FAST
            and len(texts) > 20
            and "http://a.b/c?d=e&f#g" not in texts
        ):
            ids = ids.copy()
            ids[0] ^= 1
        return ids, lengths

    monkeypatch.setattr(encoding.Encoder, "batch", wrong)
    said: list[str] = []
    mended = prepare(sources, corpus / "mended", tokenizer=tokenizer, say=said.append)
    assert mended["fingerprint"] == reference["fingerprint"]
    assert mended["encoder"]["library"].startswith("tokenizers")
    assert "its ids differ" in mended["encoder"]["not_faster_because"]
    assert any("fastokens was given up" in line for line in said)


@pytest.mark.parametrize("which", ["bpe", "mistral-v1-32k", "llama2-32k"])
def test_the_fast_library_gives_the_same_ids(
    corpus: Path, shared: Path, sample_text: str, which: str
) -> None:
    pytest.importorskip("fastokens")
    tokenizer = Tokenizer.load(
        corpus / "tokenizer" if which == "bpe" else shared / "tokenizer" / which
    )
    assert encoding.choose(tokenizer) == (encoding.FAST, "")
    rng = random.Random(1)
    kinds = [(32, 126), (160, 0x2FFF), (0x1F300, 0x1F6FF), (32, 32), (10, 10)]
    odd = ["".join(chr(rng.randint(*rng.choice(kinds))) for _ in range(150)) for _ in range(200)]
    texts = [sample_text[i : i + 700] for i in range(0, 70_000, 700)] + odd + encoding.PROBE
    fast = encoding.Encoder(tokenizer, encoding.FAST)
    assert fast.check(texts, *fast.batch(texts), range(len(texts))) == len(texts)


@pytest.mark.parametrize("which", ["bpe", "mistral-v1-32k"])
@pytest.mark.parametrize("text", ["english", "lines", "unbroken"])
def test_a_long_text_in_pieces_has_the_ids_of_the_whole(
    corpus: Path,
    shared: Path,
    sample_text: str,
    which: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "PIECE", 20_000)
    monkeypatch.setattr(encoding, "REACH", 2_000)
    tokenizer = Tokenizer.load(
        corpus / "tokenizer" if which == "bpe" else shared / "tokenizer" / which
    )
    whole = {
        "english": sample_text[:150_000],
        "lines": "".join(f"日本語の文章{i}です。\n漢字\n\n" for i in range(9000)),
        "unbroken": "x漢" * 60_000,
    }[text]
    encoder = encoding.Encoder(tokenizer, "tokenizers")
    pieces = [whole[i : i + 7_777] for i in range(0, len(whole), 7_777)]
    found = list(encoder.long(iter(pieces)))
    assert (
        np.concatenate(list(encoder.long([whole, ""]))).tolist() == np.concatenate(found).tolist()
    )
    assert np.concatenate(found).tolist() == tokenizer.encode(whole)
    assert (len(found) > 3) == (text != "unbroken")


def test_long_documents_are_read_in_pieces_and_kept_whole(
    corpus: Path, sample_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    long = sample_text[:300_000] + "ü"
    (corpus / "long.txt").write_text(long)
    lines(corpus / "mixed.jsonl", ["short one", long[:250_000], "short two", "", "three"])
    sources = [Source("a", [corpus / "mixed.jsonl", corpus / "long.txt", corpus / "many"])]
    usual = prepare(sources, corpus / "usual", tokenizer=tokenizer, held_out=0.1)
    monkeypatch.setattr(task_run, "LONG", 50_000)
    monkeypatch.setattr(tasks, "MIN_BYTES", 1 << 24)
    monkeypatch.setattr(text_reader, "WHOLE", 40_000)
    monkeypatch.setattr(compression, "UNPACKED", 9_999)
    monkeypatch.setattr(encoding, "PIECE", 30_000)
    monkeypatch.setattr(encoding, "REACH", 2_000)
    pieces = prepare(sources, corpus / "pieces", tokenizer=tokenizer, held_out=0.1)
    assert pieces["sources"][0]["documents"] == usual["sources"][0]["documents"] == 55
    for key in ("tokens", "bytes", "documents"):
        assert [pieces["splits"][s][key] for s in ("train", "held_out")] == [
            usual["splits"][s][key] for s in ("train", "held_out")
        ]
    a, b = (TokenFolder.open(corpus / name).tokens("train") for name in ("usual", "pieces"))
    assert sorted(map(bytes, np.split(a.read(0, len(a)), a.ends()))) == sorted(
        map(bytes, np.split(b.read(0, len(b)), b.ends()))
    )


def test_a_long_document_takes_little_memory(corpus: Path, sample_text: str) -> None:
    """30 MB in one text file, in a process of its own, whose memory is then asked for."""
    with open(corpus / "long.txt", "w") as file:
        for _ in range(27):
            file.write(sample_text)
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to see memory in")
    script = (
        "from pathlib import Path\nfrom mobilellm.prepare.sources import Source\n"
        "from mobilellm.prepare.prepare import prepare\nfrom mobilellm.tokenizer.tokenizer import "
        "Tokenizer\n"
        "def most():\n    return "
        "int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "t = Tokenizer.load(Path('tokenizer'))\nprepare([Source('a', [Path('plain.jsonl')])], "
        "Path('small'), tokenizer=t)\n"
        "before = most()\n"
        "m = prepare([Source('a', [Path('long.txt'), Path('plain.jsonl')])], Path('out'), "
        "tokenizer=t, workers=1)\n"
        "print(most() - before)"
    )
    pytest.importorskip("fastokens")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=corpus, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 120_000  # KiB


class TestSkipping:
    """What cannot be read: `--on-bad skip` leaves it out, counts it, and says where."""

    @pytest.fixture
    def bad(self, corpus: Path) -> Path:
        folder = corpus / "in"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(
            b'{"text": "one"}\n{"text": \n\n{"text": ""}\n{"body": "x"}\n{"text": "\xff"}\n'
            b'[1]\n{"text": "two"}\n{"text": null}'
        )
        (folder / "b.txt").write_bytes(b"\xff\xfe no")
        (folder / "c.txt").write_bytes(b"\0" * 5000)
        whole = gzip.compress(
            "".join(
                json.dumps({"text": f"number {i} {'x' * 50}"}) + "\n" for i in range(2000)
            ).encode()
        )
        (folder / "d.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        (folder / "e.jsonl").write_bytes(b"\0" * 5000)
        (folder / "f.jsonl").write_text(
            "".join(json.dumps({"text": f"fine {i}"}) + "\n" for i in range(300))
        )
        return folder

    def test_all_is_counted(self, bad: Path, corpus: Path) -> None:
        manifest = prepare(
            [Source("s", [bad])],
            corpus / "out",
            tokenizer=Tokenizer.load(corpus / "tokenizer"),
            on_bad="skip",
        )
        (source,) = manifest["sources"]
        assert (source["empty"], source["bad"]) == (1, 5 + 1 + 1 + 1 + 1)
        assert source["records"] == source["documents"] + 10
        assert source["documents"] > 302 + 500
        places = {Path(where).name: why for where, why in manifest["skipped"]["first"]}
        assert {
            "a.jsonl:2",
            "a.jsonl:5",
            "a.jsonl:6",
            "a.jsonl:7",
            "a.jsonl:9",
            "b.txt",
            "c.txt",
            "e.jsonl:1",
        } <= set(places)
        (cut,) = [name for name in places if name.startswith("d.jsonl.gz:")]
        assert "nothing from here on can be read" in places[cut]
        assert int(cut.split(":")[1]) == source["documents"] - 302 + 1

    def test_numbers_of_lines_hold_in_every_span(
        self, corpus: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [
            f'{{"text": "fine and well, line {i}"}}' if i % 97 else "{broken"
            for i in range(1, 2000)
        ]
        (corpus / "x.jsonl").write_text("\n".join(rows))
        with gzip.open(corpus / "y.jsonl.gz", "wt") as file:
            file.write("\n".join(rows))
        monkeypatch.setattr(tasks, "MIN_BYTES", 3000)
        sources = [Source("x", [corpus / "x.jsonl"]), Source("y", [corpus / "y.jsonl.gz"])]
        manifest = prepare(
            sources, corpus / "out", tokenizer=Tokenizer.load(corpus / "tokenizer"), on_bad="skip"
        )
        assert len(list((corpus / "out/train").glob("x-*[0-9].npy"))) > 10
        found = [Path(where).name for where, _ in manifest["skipped"]["first"]]
        assert found == [
            f"{name}:{i}" for name in ("x.jsonl", "y.jsonl.gz") for i in range(97, 2000, 97)
        ]
        assert [s["documents"] for s in manifest["sources"]] == [1979, 1979]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_an_unreadable_file(self, corpus: Path) -> None:
        (corpus / "many/03.txt").chmod(0)
        with pytest.raises(UserError, match=r"03\.txt: cannot be read \(Permission denied\)"):
            prepare([Source("s", [corpus / "many"])], corpus / "out", vocab_size=300)
        manifest = prepare(
            [Source("s", [corpus / "many"])], corpus / "out", vocab_size=300, on_bad="skip"
        )
        assert manifest["sources"][0]["bad"] == 1

    def test_a_file_that_changes_meanwhile_is_noticed(
        self, corpus: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = task_run.TaskRun.take

        def touching(self: task_run.TaskRun, record: object, part: object) -> None:
            os.utime(corpus / "plain.jsonl")
            real(self, record, part)  # type: ignore[arg-type]

        monkeypatch.setattr(task_run.TaskRun, "take", touching)
        with pytest.raises(UserError, match=r"plain\.jsonl: changed while it was read"):
            prepare([Source("s", [corpus / "plain.jsonl"])], corpus / "out", vocab_size=300)


def test_a_disk_that_fills_up_in_a_worker(corpus: Path) -> None:
    """With a limit on the size of files, which the system reports much as a full disk."""
    script = SCRIPT.replace(
        "tasks.MIN_BYTES =",
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); tasks.MIN_BYTES =",
    )
    run = subprocess.run(
        [sys.executable, "-c", script, "out", "2", *NAMED],
        cwd=corpus,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "File too large" in run.stderr
    assert not (corpus / "out").exists()


def test_threads_may_prepare_at_once(corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    sources = [Source("a", [corpus / "plain.jsonl"])]
    threads = [
        threading.Thread(
            target=prepare, args=(sources, corpus / f"t{i}"), kwargs={"tokenizer": tokenizer}
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({TokenFolder.open(corpus / f"t{i}").fingerprint for i in range(3)}) == 1


def test_another_tokenizer_in_the_same_place_is_not_mistaken_for_the_first(
    corpus: Path, sample_text: str
) -> None:
    sources = [Source("a", [corpus / "plain.jsonl"])]
    first, second = (
        train_bpe([text], 400) for text in (sample_text[:50_000], sample_text[200_000:250_000])
    )
    expected = prepare(sources, corpus / "other", tokenizer=second)
    prepare(sources, corpus / "out", tokenizer=first)
    shutil.rmtree(corpus / "out")
    assert prepare(sources, corpus / "out", tokenizer=second) == expected


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or len(os.sched_getaffinity(0)) < 2,
    reason="threads are counted under Linux, and a single core needs no helper",
)
def test_a_worker_encodes_without_helpers_that_would_spin(corpus: Path) -> None:
    pytest.importorskip("fastokens")
    program = (
        "import sys\nfrom pathlib import Path\nfrom mobilellm.tokenizer.encoder import Encoder\n"
        "from mobilellm.tokenizer.tokenizer import Tokenizer\n"
        "encoder = Encoder(Tokenizer.load(Path(sys.argv[1])), 'fastokens')\n"
        "encoder.batch(['many words of a text ' * 20_000] * 4)\n"
        "print(Path('/proc/self/status').read_text().split('Threads:')[1].split()[0])\n"
    )

    def threads(**environment: str) -> int:
        arguments = [sys.executable, "-c", program, str(corpus / "tokenizer")]
        done = subprocess.run(
            arguments, env=os.environ | environment, check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    assert threads(**ONE_THREAD) < threads(**ONE_THREAD | {"FASTOKENS_BPE_THREADS": "2"})
