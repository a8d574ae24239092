"""Our engine as a model of lm-eval, for whatever the harness does beyond multiple choice.

    mobilellm-lm-eval --model mobilellm --model_args pretrained=runs/demo --tasks lambada_openai

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from mobilellm.errors import UserError
from mobilellm.evaluate.engine import Engine, NetworkBackend
from mobilellm.evaluate.requests import OwnEncoder, encode
from mobilellm.evaluate.rolling import rolling_requests
from mobilellm.model.generation import Sampling
from mobilellm.model.network import Network
from mobilellm.model.precision import Precision
from mobilellm.tokenizer.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256  # the harness's


class EngineModel(LM):  # type: ignore[misc] # lm-eval is untyped
    """A network and its tokenizer behind the harness's interface."""

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        batch_tokens: int = 2048,
        precision: Precision = Precision.FP32,
    ) -> None:
        super().__init__()
        self.network, self.tokens = network, tokenizer
        self.encoder = OwnEncoder(tokenizer)
        self.engine = Engine(NetworkBackend(network, precision), batch_tokens)

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches of requests by."""
        return self.tokens.sha256

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats, greedy) of each (context, continuation); requests of one document share their beginning."""
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        made = encode(pairs, self.encoder, self.engine.backend.max_length)
        keys = [
            (request.task_name, request.doc_id, pair[0] == "")
            for request, pair in zip(requests, pairs, strict=True)
        ]
        found = [(result.loglikelihood, result.greedy) for result in self.engine.score(made, keys)]
        for pair, answer in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of each whole text."""
        texts = [str(request.args[0]) for request in requests]
        windows = list(rolling_requests(texts, self.encoder, self.engine.backend.max_length))
        flat = [window for part in windows for window in part]
        values = iter(self.engine.score(flat, range(len(flat))))
        found = [sum(next(values).loglikelihood for _ in part) for part in windows]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its `until` strings."""
        return [self.follow(str(request.args[0]), dict(request.args[1])) for request in requests]

    def follow(self, context: str, options: dict[str, Any]) -> str:
        """One continuation: greedy, or drawn at `temperature` when `do_sample` says so."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(
            options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS
        )
        room = self.engine.backend.max_length - most
        if room < 1:
            raise UserError(
                f"{most} new tokens leave no room for a context in {self.engine.backend.max_length}"
            )
        ids = self.encoder.encode_batch([context], True)[0][-room:] or [self.encoder.prefix_id]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        made: list[int] = []
        text = ""
        for token in self.network.generate(ids, most, Sampling(temperature=temperature)):
            made.append(token)
            text = self.tokens.decode(made, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text
