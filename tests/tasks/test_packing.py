"""Requests that begin alike are computed once, and score as if each were alone."""

import random

import pytest
import torch

from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.tasks.engine import Engine, NetworkBackend
from mobilellm.tasks.packing import pack
from mobilellm.tasks.requests import Request, group, request

CPU = torch.device("cpu")


def alone(network: Network, each: Request) -> float:
    with torch.no_grad():
        logits = network(torch.tensor([each.inputs]))[0, -each.scored :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(each.targets)[:, None]).sum())


def family(seed: int) -> tuple[list[Request], list[int]]:
    """Items of which many begin with the tokens of others: passages, questions on them, choices
    that begin alike, choices of one token, a question that is a passage alone."""
    draw, requests, keys = random.Random(seed), list[Request](), list[int]()

    def tokens(count: int) -> list[int]:
        return [draw.randrange(300) for _ in range(count)]

    page = tokens(10)
    for passage in [page + tokens(n) for n in (9, 13)] + [tokens(20)]:
        for question in [tokens(n) for n in (0, 8, 3, 9)]:
            first = tokens(5)
            choices = [first, [*first[:3], *tokens(2)], tokens(1), tokens(1), [*first, *tokens(2)]]
            key = len(keys)
            for choice in draw.sample(choices, draw.randrange(1, 6)):
                requests.append(request([*passage, *question, *choice], len(choice), 200))
                keys.append(key)
    order = list(range(len(keys)))
    draw.shuffle(order)
    return [requests[i] for i in order], [keys[i] for i in order]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
        {"layer_repeats": 2, "shared_kv": "first"},
    ],
    ids=["plain", "window", "shared"],
)
@pytest.mark.parametrize("batch_tokens", [60, 5000])
def test_each_scores_as_it_does_alone(more: dict[str, object], batch_tokens: int) -> None:
    torch.manual_seed(3)
    config = ModelConfig.preset(
        "1M", vocab_size=300, num_hidden_layers=2, initializer_range=0.2, **more
    )
    network = Network(config).eval()
    requests, keys = family(batch_tokens)
    found = Engine(NetworkBackend(network), batch_tokens).score(requests, keys)
    for each, result in zip(requests, found, strict=True):
        assert result.loglikelihood == pytest.approx(alone(network, each), abs=1e-4)


def test_beginnings_stand_once() -> None:
    passage, page = list(range(40)), list(range(8))
    texts = [
        [*passage, 50, 51],
        [*passage, 60, 61],
        [*page, *range(70, 80)],
        [0, 90, 91],  # shares too little
    ]
    items = group([request([*text, 99], 1, 200) for text in texts], range(4))
    row = pack(items, CPU)
    own = [span.end - span.start for span in row.spans]
    assert own == [8, 32, 2, 2, 10, 3]
    seen = [sum(end - start for start, end in span.before) for span in row.spans]
    assert seen == [0, 8, 40, 40, 8, 0]
    assert [row.tokens[place] for place in row.read] == [51, 61, 79, 91]
    assert row.depths[40:44] == [40, 41, 40, 41]
    assert len(row.tokens) == len(row.depths) == sum(own)


def test_what_several_requests_predict_at_a_place_is_read_once() -> None:
    context = [1, 2, 3, 4]
    ends = [[5], [6], [7, 8, 9], [7, 8, 10]]
    items = group([request([*context, *end], len(end), 64) for end in ends], [0] * 4)
    row = pack(items, CPU)
    assert row.tokens == [1, 2, 3, 4, 7, 8]
    assert items[0].length == 6
    assert list(row.read) == [3, 4, 5]
    assert row.scored == [[0], [0], [0, 1, 2], [0, 1, 2]]
    assert row.depths == [0, 1, 2, 3, 4, 5]
    assert row.spans[0].seen is None  # a chain needs no mask
