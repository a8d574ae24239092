"""The held-out loss is counted in one way by the loop, the end of a run and `mobilellm eval`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mobilellm.cli import main
from mobilellm.data.dataset import open_dataset
from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.held_out import held_out, held_out_of_source, score_data
from mobilellm.evaluate.perplexity import TokenList, total_loss
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.prepare.prepare import prepare
from mobilellm.prepare.sources import Source
from mobilellm.recipe.recipe import (
    DataSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    TrainSection,
)
from mobilellm.tokenizer.tokenizer import train_bpe
from mobilellm.train.start import train


def prepared(folder: Path, text: str, **options: object) -> Path:
    lines = [json.dumps({"text": part}) for part in text[:40_000].split("\n\n")]
    (folder / "text.jsonl").write_text("\n".join(lines))
    sources = [Source("text", [folder / "text.jsonl"])]
    prepare(sources, folder / "data", vocab_size=300, held_out=0.1, **options)  # type: ignore[arg-type]
    return folder / "data"


def original(folder: Path, text: str) -> Path:
    tokenizer = train_bpe([text[:20_000]], 300)
    ids = tokenizer.encode(text[:40_000])
    (folder / "data/1").mkdir(parents=True)
    rows = [ids[start : start + 33] for start in range(0, len(ids) - 33, 33)]
    lines = [json.dumps({"token_ids": row}) for row in rows]
    (folder / "data/1/a.jsonl").write_text("\n".join(lines))
    tokenizer.save(folder / "data/tokenizer")
    return folder / "data"


def recipe(data: Path, precision: str = "fp32") -> Recipe:
    return Recipe(
        model=ModelSection(preset="1M", override={"num_hidden_layers": 2}),
        data=DataSection(path=str(data), sequence_length=32),
        train=TrainSection(
            steps=4, batch_tokens=128, precision=precision, compile="off", evaluate_every=2  # type: ignore[arg-type]
        ),
        optimizer=OptimizerSection(warmup_steps=1, learning_rate=3e-3),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ends", "no ends", "original", "bf16"])
def test_eval_prints_the_loss_of_the_runs_metrics(
    kind: str, sample_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "original":
        data = original(tmp_path, sample_text)
    else:
        data = prepared(tmp_path, sample_text, eos=kind != "no ends")
    border = open_dataset(data).prefix_id
    assert (border is None) == (kind == "no ends")
    run = tmp_path / "run"
    train(run, recipe(data, "bf16" if kind == "bf16" else "fp32"))
    row = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    with pytest.raises(SystemExit) as exit_:
        main(["eval", str(run), "--json"])
    shown = capsys.readouterr()
    assert exit_.value.code == 0, shown.err
    score = json.loads(shown.out)
    assert score["loss"] == pytest.approx(row["held_out_loss"], rel=1e-12)
    assert score["bits_per_byte"] == pytest.approx(row["held_out_bits_per_byte"], rel=1e-12)


class Rank:
    """One of several processes, whose sums are added up by hand."""

    def __init__(self, rank: int, size: int, sums: list[torch.Tensor]) -> None:
        self.rank, self.size, self.sums = rank, size, sums

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums.append(tensor.clone())
        return tensor.copy_(torch.stack(self.sums).sum(0))


def network(vocab_size: int) -> Network:
    torch.manual_seed(0)
    return Network(
        ModelConfig.preset("1M", vocab_size=vocab_size, num_hidden_layers=2, initializer_range=0.1)
    ).eval()


def test_processes_divide_the_batches_and_all_get_the_sum() -> None:
    model, tokens = network(64), TokenList(np.random.default_rng(1).integers(0, 64, 1000))
    options = {"sequence_length": 16, "batch_tokens": 64, "prefix": 0}
    nats, counted = total_loss(model, tokens, **options)  # type: ignore[arg-type]
    sums: list[torch.Tensor] = []
    for rank in range(3):
        last = total_loss(model, tokens, processes=Rank(rank, 3, sums), **options)  # type: ignore[arg-type]
    assert last == (pytest.approx(nats, rel=1e-12), counted)
    shares = [float(each[1]) for each in sums]
    assert sum(shares) == counted
    assert min(shares) > 0.2 * counted


def test_a_source_begins_after_a_document_border_too(sample_text: str, tmp_path: Path) -> None:
    data = TokenFolder.open(prepared(tmp_path, sample_text))
    model = network(data.vocab_size)
    whole = held_out(model, data, sequence_length=32)
    assert whole.tokens == len(data.tokens("held_out"))
    (name,) = data.sources()
    loss = held_out_of_source(model, data, name, sequence_length=32)
    assert loss == pytest.approx(whole.loss, rel=1e-12)


def test_another_tokenizer_is_refused(sample_text: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, sample_text)
    other = train_bpe([sample_text[5_000:30_000]], 310)
    with pytest.raises(UserError, match="another tokenizer"):
        score_data(network(310), other, data, sequence_length=32)
