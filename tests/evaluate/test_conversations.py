"""The held-out loss of conversations is that of the assistant's tokens, each conversation alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.interop.networks import network
from tests.rows import write_rows

from mobilellm.conversations.prepare_chat import prepare_chat
from mobilellm.conversations.prepare_preferences import prepare_preferences
from mobilellm.data.token_folder import TokenFolder
from mobilellm.evaluate.conversations import answers_loss
from mobilellm.evaluate.held_out import held_out
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe

ANSWERS = ("an animal", "a tree that is old and tall", "grass")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "what is a fox an oak or rye an animal a tree a grass " * 20
    return train_bpe([text], 340, reserved=4)


def alone(data: TokenFolder, every: int = 1) -> tuple[float, int]:
    """Nats and tokens, one conversation after the other."""
    model = network(vocab_size=data.vocab_size)
    stream, begin, nats, counted = data.tokens("held_out"), 0, 0.0, 0
    for number, end in enumerate(stream.ends().tolist()):
        ids = torch.from_numpy(stream.read(begin, end - begin).astype("int64"))
        bits = torch.from_numpy(stream.trained(begin, end - begin))
        begin = end
        if number % every:
            continue
        with torch.no_grad():
            scores = model(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        nats -= scores[bits[1:]].sum().item()
        counted += int(bits[1:].sum())
    return nats, counted


def test_the_score_is_that_of_the_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"what is {i}", "output": ANSWERS[i % 3] + " and so on" * (i % 9)}
        for i in range(80)
    ]
    write_rows(tmp_path / "talks.jsonl", rows)
    prepare_chat([tmp_path / "talks.jsonl"], tmp_path / "d", tokenizer=tokenizer, held_out=0.4)
    data = TokenFolder.open(tmp_path / "d")
    model = network(vocab_size=data.vocab_size)
    nats, counted = alone(data)
    longest = max(n for part in data.tokens("held_out").document_lengths() for n in part)
    assert longest <= 128
    score = held_out(model, data, sequence_length=128)
    assert (score.loss, score.tokens) == (pytest.approx(nats / counted, rel=1e-5), counted)
    size = data.text_bytes("held_out")
    assert 0 < size < counted * 4
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    short = answers_loss(model, data.tokens("held_out"), sequence_length=48, stride=1)
    assert short[1] == counted  # each token once, with as much of its conversation as there is room


def test_of_pairs_the_chosen_answers_are_scored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"what is {i}", "chosen": ANSWERS[i % 3], "rejected": "rye"} for i in range(60)
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    manifest = prepare_preferences(
        [tmp_path / "pairs.jsonl"],
        tmp_path / "d",
        tokenizer=tokenizer,
        sequence_length=120,
        held_out=0.4,
    )
    data = TokenFolder.open(tmp_path / "d")
    nats, counted = alone(data, every=2)
    score = held_out(network(vocab_size=data.vocab_size), data, sequence_length=120)
    assert (score.loss, score.tokens) == (pytest.approx(nats / counted, rel=1e-5), counted)
    assert score.bytes == manifest["preferences"]["chosen_bytes"]["held_out"]
    said = sum(manifest["preferences"]["chosen_bytes"].values())
    assert said == sum(len(ANSWERS[i % 3]) for i in range(60))
