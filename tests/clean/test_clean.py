"""Cleaning: what each step drops, that no document is lost, and that it goes on where it was
stopped."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")

from mobilellm.clean import passages, steps
from mobilellm.clean.passages import ngram_hashes
from mobilellm.clean.stages import clean
from mobilellm.errors import UserError
from mobilellm.prepare import tasks
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source


def sentence(seed: int, words: int = 120) -> str:
    rng = np.random.default_rng(seed)
    known = [
        f"{a}{b}"
        for a in ("ba", "co", "di", "fu", "ge", "ha", "ki")
        for b in ("lor", "men", "nis", "pat", "rus", "ta", "vox")
    ]
    return " ".join(known[i] for i in rng.integers(0, len(known), words)) + "."


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    quiz = sentence(900, 30)
    good = [sentence(i) for i in range(60)]
    near = good[3].split()
    near[7] = "changed"
    rows = {
        "a": [
            *good[:40],
            good[0],
            "too short",
            "1234 5678 90 " * 30,
            "the same line again\n" * 30,
            "",
            "bad\ufffd" * 40,
        ],
        "b": [
            *good[40:],
            good[5] + "  \n",
            " ".join(near),
            f"{sentence(901)} {quiz} {sentence(902)}",
        ],
    }
    for name, texts in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in texts)
        )
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/quiz.jsonl").write_text(
        json.dumps({"question": quiz, "choices": {"text": ["yes", "no"]}}) + "\n"
    )
    return tmp_path


def test_each_step_drops_what_it_is_for_and_nothing_is_lost(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MIN_BYTES", 8000)
    sources = [Source(name, [corpus / f"{name}.jsonl"]) for name in "ab"]
    report, cleaned = clean(sources, corpus / "work", decontaminate=corpus / "eval")
    dropped = {step: entry["documents"] for step, entry in report["dropped"].items()}
    assert dropped == {
        "unreadable": 0,
        "quality": 5,
        "decontamination": 1,
        "exact duplicate": 2,
        "near duplicate": 1,
    }
    assert (report["documents_read"], report["documents_kept"]) == (69, 60)
    reasons = report["dropped"]["quality"]["reasons"]
    assert reasons == {"broken characters": 1, "few letters": 1, "repeated lines": 1, "short": 2}
    (example,) = report["dropped"]["decontamination"]["examples"]
    assert "shares a passage with an evaluation set: " in example["why"]
    assert "b.jsonl" in example["where"]
    manifest = prepare(cleaned, corpus / "data", vocab_size=300)
    assert sum(source["documents"] for source in manifest["sources"]) == 60
    before = {p: p.stat().st_mtime_ns for p in (corpus / "work").rglob("cleaned/**/*.jsonl")}
    again, _ = clean(sources, corpus / "work", decontaminate=corpus / "eval")
    assert again == report
    assert {
        p: p.stat().st_mtime_ns for p in (corpus / "work").rglob("cleaned/**/*.jsonl")
    } == before
    other, _ = clean(sources, corpus / "work")  # other settings take nothing over
    assert other["dropped"]["decontamination"]["documents"] == 0
    assert other["documents_kept"] == 61


def test_bad_lines_stop_or_are_counted(corpus: Path) -> None:
    with open(corpus / "a.jsonl", "a") as file:
        file.write("{broken\n")
    sources = [Source("a", [corpus / "a.jsonl"])]
    with pytest.raises(UserError, match=r"a\.jsonl:47: broken JSON"):
        clean(sources, corpus / "stop")
    report, _ = clean(sources, corpus / "skip", on_bad="skip")
    assert report["dropped"]["unreadable"]["documents"] == 1


def test_two_runs_at_once_are_refused(corpus: Path) -> None:
    import fcntl

    (corpus / "work").mkdir()
    with open(corpus / "work/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is cleaning there"):
            clean([Source("a", [corpus / "a.jsonl"])], corpus / "work")


def test_runs_of_words_are_told_apart_and_found_in_any_script() -> None:
    assert len(ngram_hashes("one two three", 4)) == 0
    hashes = ngram_hashes("a b c d e a b c d", 4)
    assert hashes[0] == hashes[5]
    assert len(set(hashes.tolist())) == 5
    assert np.array_equal(
        ngram_hashes("Hello, WORLD one", 2), ngram_hashes("hello world... ONE!", 2)
    )
    assert len(ngram_hashes("日本語の文章", 3)) == 4
    assert ngram_hashes("a b", 2) != ngram_hashes("b a", 2)


def test_the_real_evaluation_sets(shared: Path, tmp_path: Path) -> None:
    row = json.loads((shared / "eval/boolq.jsonl").read_text().splitlines()[5])
    step = steps.Decontaminate(shared / "eval")
    assert len(step.hashes[13]) > 100_000
    document = steps.Document(f"{sentence(1)} {row['passage']} {sentence(2)}", "x")
    assert step.filter(document) is not True
    assert step.filter(steps.Document(sentence(3, 4000), "x")) is True


def test_folders_without_evaluation_sets_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of evaluation sets"):
        passages.evaluation_ngrams(tmp_path / "none")
    with pytest.raises(UserError, match="no evaluation set in it"):
        passages.evaluation_ngrams(tmp_path)


def test_tokenizing_is_a_step_of_a_datatrove_pipeline(corpus: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    from mobilellm.data.token_folder import TokenFolder
    from mobilellm.data.validate import validate
    from mobilellm.prepare.pipeline import FinishShards, TokenShards
    from mobilellm.tokenizer.tokenizer import train_bpe

    texts = [
        json.loads(line)["text"]
        for name in "ab"
        for line in (corpus / f"{name}.jsonl").read_text().splitlines()
    ]
    train_bpe(texts, 300).save(corpus / "tokenizer")
    shards = TokenShards(corpus / "data", corpus / "tokenizer", held_out=0.1)
    sources = [Source(name, [corpus / f"{name}.jsonl"]) for name in "ab"]
    reader = steps.ReadSources(sources, corpus / "work", "text", "stop")
    with pytest.raises(UserError, match="0 of 2 tasks"):
        list(FinishShards(shards, 2).run())
    LocalPipelineExecutor(
        pipeline=[reader, shards], tasks=2, workers=1, logging_dir=str(corpus / "log1")
    ).run()
    LocalPipelineExecutor(
        pipeline=[FinishShards(shards, 2)], tasks=1, workers=1, logging_dir=str(corpus / "log2")
    ).run()
    folder = TokenFolder.open(corpus / "data", verify=True)
    assert folder.sources() == ["a", "b"]
    assert validate(corpus / "data").faults_in_all == 0
    found = []
    for split in ("train", "held_out"):
        stream = folder.tokens(split)
        start = 0
        for end in stream.ends().tolist():
            found.append(folder.tokenizer().decode(stream.read(start, end - 1 - start).tolist()))
            start = end
    assert sorted(found) == sorted(text for text in texts if text)
    assert not (corpus / "data.preparing").exists()


def test_the_verb_cleans_in_several_processes(
    corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from mobilellm.cli import main

    for name in "ab":
        (corpus / "in").mkdir(exist_ok=True)
        (corpus / f"{name}.jsonl").rename(corpus / f"in/{name}.jsonl")
    arguments = [
        "prepare",
        str(corpus / "in/a.jsonl"),
        str(corpus / "in/b.jsonl"),
        "--out",
        str(corpus / "out"),
        "--vocab-size",
        "300",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--clean", "--decontaminate", str(corpus / "eval"), "--workers", "2"])
    shown = capfd.readouterr()
    assert ended.value.code == 0, shown.err
    assert (
        "69 in = 60 out + dropped: 5 quality, 1 decontamination, 2 exact duplicate, 1 near "
        "duplicate" in shown.out
    )
    assert "INFO" not in shown.err
    manifest = json.loads((corpus / "out/manifest.json").read_text())
    assert manifest["cleaning"]["dropped"]["near duplicate"]["examples"][0]["text"]
    assert sorted(p.name for p in corpus.iterdir()) == ["eval", "in", "out"]
