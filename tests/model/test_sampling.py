"""Logits are penalized and cut as transformers' own processors do it."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mobilellm.errors import UserError
from mobilellm.interop.sampling_defaults import sampling_of
from mobilellm.model.config import ModelConfig
from mobilellm.model.generation import Sampling, cut, draw, penalized
from mobilellm.model.network import Network

BEFORE = [3, 17, 17, 40, 5]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.3, "repetition_penalty": 0.8},
        {"temperature": 0.3, "min_p": 1.0},
    ],
    ids=str,
)
def test_scores_are_those_of_transformers(values: dict) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50) * 3
    sampling = Sampling(**values)
    scores, ids = logits[None].clone(), torch.tensor([BEFORE])
    for processor in (
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k or 50),
        TopPLogitsWarper(sampling.top_p),
        MinPLogitsWarper(sampling.min_p),
    ):
        scores = processor(ids, scores)
    found = cut(penalized(logits, sampling.repetition_penalty, BEFORE), sampling)
    torch.testing.assert_close(found, scores[0], atol=1e-6, rtol=0)
    assert torch.isinf(found).any()


def test_a_penalty_changes_what_is_written_and_the_prompt_counts() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    greedy = Sampling(repetition_penalty=1.5)
    assert draw(logits, greedy, None) == 0
    assert draw(logits, greedy, None, [0]) == 1
    torch.manual_seed(0)
    network = Network(ModelConfig.preset("1M", vocab_size=64)).eval()
    plain = list(network.generate([1, 2], 12, stop=()))
    other = list(network.generate([1, 2], 12, Sampling(repetition_penalty=5.0), stop=()))
    assert len(set(other)) == 12
    assert not {1, 2} & set(other)
    assert len(set(plain)) < 12


def test_makers_settings_are_taken_where_they_act() -> None:
    all_five = {"temperature": 0.6, "top_k": 7, "top_p": 0.9, "min_p": 0.1,
                "repetition_penalty": 1.1}  # fmt: skip
    assert sampling_of(all_five) == all_five
    none = {"temperature": 0.6, "min_p": 0.0, "repetition_penalty": 1.0}
    assert sampling_of(none) == {"temperature": 0.6, "top_k": 0, "top_p": 1.0}
    greedy = {"do_sample": False, "repetition_penalty": 1.2, "min_p": 0.1}
    assert sampling_of(greedy) == {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.2,
    }
    assert sampling_of({"min_p": "a", "repetition_penalty": -1}) == {}


@pytest.mark.parametrize("values", [{"min_p": 1.5}, {"min_p": -0.1}, {"repetition_penalty": 0.0}])
def test_values_that_cannot_be_meant_are_refused(values: dict) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)
