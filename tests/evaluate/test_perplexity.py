"""Scores against a plain loop, and the properties that make them comparable."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mobilellm.errors import UserError
from mobilellm.evaluate.baselines import baselines
from mobilellm.evaluate.perplexity import TokenList, perplexity, windows
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    found = Network(
        ModelConfig.preset("1M", vocab_size=64, num_hidden_layers=2, initializer_range=0.1)
    )
    return found.eval()


TOKENS = np.random.default_rng(0).integers(0, 64, 1000)


@pytest.mark.parametrize("prefix", [None, 0])
@pytest.mark.parametrize(
    ("length", "stride"), [(64, 64), (64, 16), (7, 7), (7, 1), (512, 512), (512, 100)]
)
@pytest.mark.parametrize("count", [2, 7, 8, 64, 65, 1000])
def test_every_token_is_a_target_exactly_once(
    length: int, stride: int, prefix: int | None, count: int
) -> None:
    stream = np.arange(count) + 1
    scored: list[int] = []
    for inputs, targets in windows(TokenList(stream), length, 256, prefix, stride):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= length
        assert ((targets == inputs + 1) | (targets == -100)).all()
        scored.extend(targets[targets != -100].tolist())
    assert sorted(scored) == list(range(1 if prefix is not None else 2, count + 1))


def test_equals_a_plain_loop(network: Network) -> None:
    score = perplexity(network, TokenList(TOKENS), 2000, sequence_length=64, prefix=0)
    whole = torch.from_numpy(np.concatenate(([0], TOKENS)))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(whole) - 1, 64):
            # The last window looks back over a whole length, and counts only what is new.
            begin = min(start, len(whole) - 65)
            logits = network(whole[None, begin : begin + 64])[0]
            losses = F.cross_entropy(logits, whole[begin + 1 : begin + 65], reduction="none")
            nats += losses[start - begin :].sum().item()
    assert score.tokens == 1000
    assert score.loss == pytest.approx(nats / 1000, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nats / 1000), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / 2000, rel=1e-6)


def test_batch_size_does_not_change_the_score(network: Network) -> None:
    scores = [
        perplexity(network, TokenList(TOKENS), 2000, sequence_length=32, batch_tokens=n).loss
        for n in (32, 320, 10_000)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_more_context_is_used_with_a_stride(network: Network) -> None:
    """A stride of one equals the loss of each token behind a full window."""
    score = perplexity(network, TokenList(TOKENS[:100]), 100, sequence_length=16, stride=1)
    ids = torch.from_numpy(TOKENS[:100])
    with torch.no_grad():
        nats = [
            F.cross_entropy(network(ids[None, max(0, i - 16) : i])[0, -1:], ids[i : i + 1]).item()
            for i in range(1, 100)
        ]
    assert score.loss == pytest.approx(np.mean(nats), rel=1e-5)


def test_refusals(network: Network) -> None:
    with pytest.raises(UserError, match="no text to score"):
        perplexity(network, TokenList(TOKENS[:1]), 1, sequence_length=16)
    with pytest.raises(UserError, match="exceeds the model's context of 512"):
        perplexity(network, TokenList(TOKENS), 1, sequence_length=513)
    with pytest.raises(UserError, match="stride 17"):
        perplexity(network, TokenList(TOKENS), 1, sequence_length=16, stride=17)


def test_baselines() -> None:
    train, held_out = np.repeat(np.arange(4), [5, 1, 1, 1]), np.array([0, 0, 1, 3])
    figures = baselines(TokenList(train), TokenList(held_out), 8, 4, "ab" * 5000, "ab" * 100)
    nats = -(2 * math.log(6 / 12) + 2 * math.log(2 / 12))
    assert figures["unigram"] == pytest.approx(nats / math.log(2) / 8)
    assert figures["xz_after_train"] < figures["xz"]
    assert figures["gzip"] > 0
    assert figures["bytes_compressed"] == 200
