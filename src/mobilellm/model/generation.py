"""Generation: one token after another, from a prompt, with a key/value cache.

    for token in generate(network, prompt, 50, Sampling(temperature=0.8, top_p=0.95, seed=1)):
        ...

Greedy at temperature 0. One seed gives one text on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mobilellm.errors import UserError
from mobilellm.model.cache import KVCache
from mobilellm.model.config import ModelConfig


class CachedNetwork(Protocol):
    """What generation asks of a network."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        ...

    @property
    def norm(self) -> nn.Module:
        """The last norm, whose weight has the type and the device of what is computed."""
        ...

    def hidden(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """The last hidden states of (B, T) tokens after those in `cache`, (B, T, C)."""
        ...

    def output(self, hidden: Tensor) -> Tensor:
        """Logits of last hidden states: (..., C) -> (..., V)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The penalty and the cuts apply in the order of transformers:
    repetition, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 is no limit."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities reach p (arXiv 1904.09751); 1 is
    no limit."""
    min_p: float = 0.0
    """Draw among the tokens that are at least this share as probable as the likeliest; 0 is no
    limit."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that stand in prompt or text already, and multiplies
    the negative ones (arXiv 1909.05858); 1 is none."""
    seed: int = 0
    """Seeds the draw."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p {self.min_p}: must be from 0 (no limit) to 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(
                f"repetition_penalty {self.repetition_penalty}: must be above 0; 1 is none"
            )


# Below it, dividing by the temperature leaves float32's range; the likeliest is drawn long before.
COLDEST = 1e-30


# How many of the likeliest tokens are looked at for those that make up top_p.
LIKELIEST = (256, 4096)


def draw(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    before: Sequence[int] = (),
) -> int:
    """One token from logits (V,) after the tokens `before`, which a repetition penalty is for."""
    if sampling.repetition_penalty != 1 and before:
        logits = penalized(logits, sampling.repetition_penalty, before)
    if sampling.temperature < COLDEST:
        return int(logits.argmax())
    scores = cut(logits, sampling)
    return int(torch.multinomial(scores.softmax(0), 1, generator=generator))


def penalized(logits: Tensor, penalty: float, before: Sequence[int]) -> Tensor:
    """Logits (V,) with those of the tokens `before` made smaller."""
    tokens = torch.tensor(sorted(set(before)))
    found = logits.float()[tokens]
    return logits.float().index_copy(
        0, tokens, torch.where(found < 0, found * penalty, found / penalty)
    )


def cut(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (V,) at the temperature, -inf for tokens that are not drawn among."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = logits.softmax(0)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -math.inf)
    return logits


def _nucleus(logits: Tensor, mass: float) -> Tensor:
    """Logits (V,) of the fewest likeliest tokens that have this mass together; the others -inf.

    They are looked for among ever more of the likeliest: sorting all of a large vocabulary takes
    longer than computing a token does (docs/log.md).
    """
    probabilities = logits.softmax(0)
    for size in (*LIKELIEST, len(logits)):
        likeliest, order = probabilities.topk(min(size, len(logits)))
        before = likeliest.cumsum(0) - likeliest  # so that the first one always stays
        if size >= len(logits) or float(before[-1]) >= mass:
            break
    kept = order[before < mass]
    return torch.full_like(logits, -math.inf).index_copy_(0, kept, logits[kept])


@torch.inference_mode()
def generate(
    network: CachedNetwork,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] | None = None,
    step: Callable[[KVCache, int], np.ndarray] | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens that continue `prompt`, ending before a token of `stop`.

    `stop` is the configuration's end-of-text tokens when not given. `step` computes logits (V,)
    behind a single token in place of the network (decoding/decoder.py). `UserError` when the
    prompt is empty, or prompt and new tokens together exceed max_position_embeddings."""
    config = network.config
    if stop is None:
        stop = config.end_tokens
    if not prompt:
        raise UserError(
            "the prompt is empty and the model has no BOS token", hint="give at least one token"
        )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be 0 or more")
    length = len(prompt) + max_new_tokens
    if length > config.max_position_embeddings:
        raise UserError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones exceed the model's "
            "context of "
            f"{config.max_position_embeddings}",
            hint=f"at most {max(0, config.max_position_embeddings - len(prompt))} new ones fit",
        )
    if (largest := max(prompt)) >= config.vocab_size or min(prompt) < 0:
        raise UserError(
            f"token {largest} in the prompt is outside the vocabulary of {config.vocab_size}"
        )
    # A CPU generator whatever the device: the draw is one small vector, and the same seed then
    # gives the same text.
    generator = torch.Generator().manual_seed(sampling.seed)
    like = network.norm.weight
    assert isinstance(like, Tensor)
    cache, tokens = KVCache(config, 1, length, like=like), list(prompt)
    seen = list(prompt)
    for _ in range(max_new_tokens):
        if step is not None and len(tokens) == 1:
            logits = torch.from_numpy(step(cache, tokens[0]))
        else:
            hidden = network.hidden(torch.tensor([tokens], device=like.device), cache)
            logits = network.output(hidden[:, -1])[0].cpu()
        token = draw(logits, sampling, generator, seen)
        if token in stop:
            return
        yield token
        seen.append(token)
        tokens = [token]
