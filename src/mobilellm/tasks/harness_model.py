"""Our engine as a model of lm-eval: for `mobilellm eval --tasks`, and for the harness's own
command.

    mobilellm-lm-eval --model mobilellm --model_args pretrained=runs/demo --tasks lambada_openai

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mobilellm.errors import UserError, unknown_name
from mobilellm.model.generation import Sampling
from mobilellm.model.network import Network
from mobilellm.tasks.engine import Engine
from mobilellm.tasks.requests import Encoder, encode
from mobilellm.tasks.result_cache import Progress, ResultCache, score_cached
from mobilellm.tasks.rolling import rolling_requests
from mobilellm.tokenizer.chat_template import ChatTemplate, unused_characters
from mobilellm.tokenizer.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise UserError(f"tasks need lm-eval ({error})", hint="pip install 'mobilellm[eval]'") from None

DEFAULT_NEW_TOKENS = 256  # the harness's


class EngineModel(LM):  # type: ignore[misc] # lm-eval is untyped
    """An engine and its encoder as a model of the harness.

    `cache` gives the results of an earlier run and keeps those of this one; `progress(done, total)`
    counts documents. Text can be generated where a `network` with its `tokenizer` is given.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        *,
        cache: ResultCache | None = None,
        progress: Progress | None = None,
        network: Network | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.engine, self.encoder, self.cache, self.progress = engine, encoder, cache, progress
        self.network, self.tokens = network, tokenizer
        self.template: ChatTemplate | None = None
        """What `chat_template` chose, for `apply_chat_template`."""
        self.cut: set[Hashable] = set()
        """(task, document) of requests that lost their beginning to the model's context."""
        self.apart: set[Hashable] = set()
        """(task, document) of continuations that were encoded by themselves."""

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches of requests by."""
        return self.tokens.sha256 if self.tokens is not None else ""

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the tokenizer's own template, or its template of that name; the text of it.

        None when none is wanted. `UserError` where there is none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        if self.tokens is None or self.tokens.chat_template is None:
            raise UserError(
                "this model's tokenizer has no chat template",
                hint="leave out --apply_chat_template",
            )
        name = chat_template if isinstance(chat_template, str) else ""
        if name not in ("", "default") and name not in self.tokens.named_templates:
            raise unknown_name("chat template", name, ["default", *self.tokens.named_templates])
        self.template = ChatTemplate.of(self.tokens, name=name)
        return self.template.source

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the template renders it.

        Without `add_generation_prompt` the last message is to be continued: the text ends with it.
        """
        if self.template is None:
            self.chat_template(True)
        assert self.template is not None
        if add_generation_prompt:
            return self.template.render(chat_history, add_generation_prompt=True).text
        # A mark at the end of the last message says where to stop; a template that strips messages
        # takes away the space behind the mark.
        (mark,) = unused_characters([self.template.source, list(chat_history)], 1)
        last = dict(chat_history[-1])
        last["content"] = f"{last['content']}{mark} "
        text = self.template.render([*chat_history[:-1], last]).text
        if mark not in text:
            raise UserError("the chat template leaves out the last message, which is to go on")
        kept, _, after = text.rpartition(mark)
        return kept if after.startswith(" ") else kept.rstrip()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats, greedy) of each (context, continuation).

        Requests of one document share their beginning, but for those without a context.
        """
        pairs = [(str(request.args[0]), str(request.args[1])) for request in requests]
        made = encode(pairs, self.encoder, self.engine.backend.max_length)
        owners = [(request.task_name, request.doc_id) for request in requests]
        self.cut |= {owner for owner, each in zip(owners, made, strict=True) if each.cut}
        self.apart |= {owner for owner, each in zip(owners, made, strict=True) if each.apart}
        keys = [(*owner, pair[0] == "") for owner, pair in zip(owners, pairs, strict=True)]
        results = score_cached(self.engine, made, keys, self.cache, self.progress)
        found = [(result.loglikelihood, result.greedy) for result in results]
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
        keys = range(len(flat))
        values = iter(score_cached(self.engine, flat, keys, self.cache, self.progress))
        found = [sum(next(values).loglikelihood for _ in part) for part in windows]
        for text, value in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its `until` strings."""
        return [self.follow(str(request.args[0]), dict(request.args[1])) for request in requests]

    def follow(self, context: str, options: dict[str, Any]) -> str:
        """One continuation: greedy, or drawn at `temperature` when `do_sample` says so.

        `UserError` when the model cannot generate, or the new tokens leave no room for a context.
        """
        if self.network is None or self.tokens is None:
            raise UserError("this model scores texts and does not generate any")
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
