"""`mobilellm eval --tasks` on tiny models and the shipped sets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests import command_line

from mobilellm.interop.folder import save_checkpoint
from mobilellm.interop.load import load
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tasks.engine import NetworkBackend
from mobilellm.tasks.harness_tasks import COMMONSENSE, load_tasks
from mobilellm.tasks.requests import Item, Result
from mobilellm.tasks.task_scores import score_tasks
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

TASKS = list(COMMONSENSE)


def call(
    capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0
) -> tuple[str, str]:
    return command_line.call(capsys, "eval", *arguments, status=status)


@pytest.fixture(scope="module")
def tokenizer(sample_text: str) -> Tokenizer:
    return train_bpe([sample_text[:60_000]], 500)


def tiny(folder: Path, tokenizer: Tokenizer, seed: int, context: int = 1024) -> Path:
    torch.manual_seed(seed)
    config = ModelConfig.preset(
        "1M",
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=2,
        initializer_range=0.3,
        max_position_embeddings=context,
    )
    folder.mkdir()
    save_checkpoint(folder, Network(config), tokenizer, {})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny(folder / "one", tokenizer, 1), tiny(folder / "two", tokenizer, 2)


@pytest.fixture(scope="module")
def sets(shared: Path) -> Path:
    return shared / "eval"


@pytest.fixture(scope="module")
def peer(models: tuple[Path, Path], sets: Path) -> dict[str, dict[str, object]]:
    """The harness's own evaluation on its own backend, of the same task objects."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = {name: task.task for name, task in load_tasks(["commonsense"], sets).items()}
    model = HFLM(pretrained=str(models[0]), device="cpu", dtype="float32", batch_size=4)
    return lm_eval.evaluate(lm=model, task_dict=tasks, limit=12, bootstrap_iters=10)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def scores(models: tuple[Path, Path], sets: Path) -> dict[str, dict[str, object]]:
    loaded = load(models[0])
    assert loaded.tokenizer is not None
    return score_tasks(loaded.network, loaded.tokenizer, ["commonsense"], sets, limit=12)


def test_rechecked_choices_are_those_of_fp32(
    models: tuple[Path, Path], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (models[0], "--tasks", "piqa", "--data", sets, "--limit", 60, "--cache", tmp_path)
    out, _ = call(capsys, *arguments, "--json")
    fast = ("--precision", "bf16", "--recheck", "--out", tmp_path / "out")
    text, _ = call(capsys, *arguments, *fast)
    found = json.loads((tmp_path / "out" / "scores.json").read_text())[models[0].name]
    again = found["piqa"].pop("checked")["again"]
    assert found == json.loads(out)
    assert 32 <= again <= 60
    assert f"{again} items again in fp32, no choice is bf16's own" in text
    _, error = call(capsys, models[0], "--tasks", "piqa", "--data", sets, "--recheck", status=2)
    assert "--recheck is for --precision bf16" in error
    _, error = call(capsys, models[0], "--text", "x", "--recheck", status=2)
    assert "--recheck are for tasks" in error
    wikitext = ("--tasks", "wikitext", "--data", sets, "--limit", 1, "--cache", tmp_path)
    _, error = call(capsys, models[0], *wikitext, "--precision", "bf16", "--recheck", status=2)
    assert "'wikitext' has no choices" in error


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_the_harnesss_own(
    name: str, scores: dict[str, dict[str, object]], peer: dict[str, dict[str, object]]
) -> None:
    theirs = peer["results"][name]
    for metric in ("acc", "acc_norm"):
        assert scores[name].get(metric) == theirs.get(f"{metric},none")
    assert scores[name]["acc_stderr"] == pytest.approx(theirs["acc_stderr,none"])
    assert scores[name]["count"] == 12
    assert scores[name]["split"] == COMMONSENSE[name].split


def test_the_average_is_over_tasks(scores: dict[str, dict[str, object]]) -> None:
    assert scores["average"]["acc"] == pytest.approx(sum(scores[name]["acc"] for name in TASKS) / 8)
    best = [scores[name].get("acc_norm", scores[name]["acc"]) for name in TASKS]
    assert scores["average"]["acc_norm"] == pytest.approx(sum(best) / 8)


def test_scoring_leaves_mode_and_random_numbers_alone(
    models: tuple[Path, Path], sets: Path
) -> None:
    loaded = load(models[0])
    assert loaded.tokenizer is not None
    loaded.network.train()
    before = torch.get_rng_state()
    score_tasks(loaded.network, loaded.tokenizer, ["openbookqa"], sets, limit=2)
    assert loaded.network.training
    assert torch.equal(torch.get_rng_state(), before)


def test_the_papers_protocol_is_what_it_says(
    models: tuple[Path, Path], sets: Path, tmp_path: Path, capsys
) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    call(
        capsys,
        models[0],
        "--tasks",
        "obqa",
        "boolq",
        "piqa",
        "--data",
        sets,
        "--limit",
        5,
        "--protocol",
        "paper",
        "--cache",
        tmp_path / "cache",
        "--out",
        out,
    )
    network, rows = (
        load(models[0]),
        [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()],
    )
    assert len(rows) == 15

    def loglikelihood(context: str, continuation: str) -> float:
        before, ids = (
            network.tokenizer.encode(context),
            network.tokenizer.encode(context + continuation),
        )
        with torch.no_grad():
            logprobs = network.network(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return sum(logprobs[i - 1, ids[i]].item() for i in range(len(before), len(ids)))

    for row in rows:
        for text, score in zip(row["continuations"], row["scores"], strict=True):
            value = loglikelihood(row["context"][0], text)
            relative = row["task"] != "piqa"
            expected = value - loglikelihood("Answer:", text) if relative else value / len(text[1:])
            assert score == pytest.approx(expected, abs=1e-3)
        assert row["chosen"] == max(range(len(row["scores"])), key=row["scores"].__getitem__)
    written = json.loads((out / "scores.json").read_text())["one"]
    assert {score["protocol"] for score in written.values()} == {"paper"}
    assert "acc_norm" not in written["piqa"]


def test_two_models_are_compared_and_a_second_run_reads_the_cache(
    models: tuple[Path, Path],
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        *models,
        "--tasks",
        "arc_easy",
        "winogrande",
        "--data",
        sets,
        "--limit",
        10,
        "--cache",
        tmp_path / "cache",
        "--compare",
        "--explain",
        2,
        "--out",
        tmp_path / "out",
    ]
    first, _ = call(capsys, *arguments)
    assert "\n| one  " in first
    assert "\n| OPT-125M " in first
    assert "McNemar" in first
    assert "<- " in first
    assert (tmp_path / "out/table.html").is_file()
    monkeypatch.setattr(
        "mobilellm.tasks.engine.NetworkBackend.score",
        lambda self, items: pytest.fail("computed again"),
    )
    assert call(capsys, *arguments)[0] == first


def test_an_interrupted_run_continues(
    models: tuple[Path, Path],
    sets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        models[0],
        "--tasks",
        "arc_easy",
        "--data",
        sets,
        "--limit",
        20,
        "--batch-tokens",
        500,
        "--json",
        "--cache",
    ]
    expected, _ = call(capsys, *arguments, tmp_path / "whole")
    computed: list[int] = []
    real = NetworkBackend.score

    def score(self: NetworkBackend, items: list[Item]) -> list[list[Result]]:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(len(items))
        return real(self, items)

    monkeypatch.setattr(NetworkBackend, "score", score)
    call(capsys, *arguments, tmp_path / "cut", status=130)
    before = sum(computed)
    assert 0 < before < 20
    computed[:] = [0] * 4  # from here on nothing interrupts
    assert call(capsys, *arguments, tmp_path / "cut")[0] == expected
    assert sum(computed) == 20 - before


def test_an_altered_file_is_named_and_its_scores_marked(
    models: tuple[Path, Path], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = (sets / "openbookqa.jsonl").read_text().splitlines(keepends=True)
    (data / "openbookqa.jsonl").write_text("".join(rows[:40]))
    out, error = call(
        capsys,
        models[0],
        "--tasks",
        "openbookqa",
        "--data",
        data,
        "--cache",
        tmp_path / "cache",
        "--limit",
        3,
    )
    assert "openbookqa.jsonl: altered" in error
    assert "40 rows where 500 are known" in error
    assert "data altered" in out
    (data / "openbookqa.jsonl").write_text(rows[0] + "{broken\n")
    _, error = call(capsys, models[0], "--tasks", "openbookqa", "--data", data, status=2)
    assert "line 2 is not JSON" in error


def test_a_short_context_is_counted_and_said(
    tokenizer: Tokenizer, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(tmp_path / "short", tokenizer, 3, context=100)
    out, error = call(
        capsys,
        model,
        "--tasks",
        "boolq",
        "--data",
        sets,
        "--limit",
        4,
        "--cache",
        tmp_path / "cache",
        "--json",
    )
    assert json.loads(out)["boolq"]["truncated"] == 4
    assert "4 items exceed the model's context" in error


def test_wikitext_in_both_ways_of_counting(
    models: tuple[Path, Path], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data/wikitext2_raw"
    data.mkdir(parents=True)
    for name in ("wiki.test.raw", "wiki.test.pages.jsonl"):
        (data / name).write_text(
            "".join((sets / "wikitext2_raw" / name).read_text().splitlines(keepends=True)[:40])[
                :60_000
            ]
        )
    pages = (sets / "wikitext2_raw/wiki.test.pages.jsonl").read_text().splitlines(keepends=True)
    (data / "wiki.test.pages.jsonl").write_text(pages[0])
    arguments = [
        models[0],
        "--tasks",
        "wikitext2",
        "wikitext",
        "--data",
        data.parent,
        "--cache",
        tmp_path / "cache",
    ]
    scores = json.loads(call(capsys, *arguments, "--json")[0])
    assert scores["wikitext2"]["length"] == 1024
    assert {"word_perplexity", "byte_perplexity", "bits_per_byte", "altered"} <= set(
        scores["wikitext"]
    )
    shown, _ = call(capsys, *arguments)
    assert "windows of 1024; original; data altered" in shown
    arguments[2:4] = ["wikitext2", "--sequence-length", 256, "--stride", 128]
    assert "windows of 256, stride 128; sliding; data altered" in call(capsys, *arguments)[0]


def test_without_a_model_the_published_tables_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobilellm.report.score_table import published_rows

    rows = published_rows()
    shown, _ = call(capsys, "--compare", "--out", tmp_path / "out")
    assert len(rows) > 10
    assert all(f"| {row.model} " in shown for row in rows)
    assert (tmp_path / "out/table.html").is_file()
    made = json.loads(call(capsys, "--compare", "--json")[0])
    assert [row["model"] for row in made] == [row.model for row in rows]
    _, error = call(capsys, status=2)
    assert "no model given" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "hellaswgg"], "did you mean 'hellaswag'"),
        (["--tasks", "piqa", "--data", "nowhere"], "nowhere/piqa.jsonl: no such task data"),
        (["--tasks", "piqa", "--limit", "0"], "--limit 0"),
        (["--tasks", "piqa", "--explain", "3"], "needs two models"),
        (["--limit", "3"], "are for tasks"),
    ],
)
def test_bad_input_is_one_line(
    models: tuple[Path, Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, error = call(capsys, models[0], *arguments, status=2)
    assert said in error
    assert error.count("\n") == 1


def test_a_model_without_tokenizer_is_one_line(
    models: tuple[Path, Path], sets: Path, tmp_path: Path, capsys
) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(models[0], tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*token*"):
        path.unlink()
    _, error = call(capsys, tmp_path / "bare", "--tasks", "piqa", "--data", sets, status=2)
    assert "has no tokenizer" in error
