"""A model asked, as the scores of calls and of instructions ask it.

ask = Asker(model, max_new_tokens=192)
ask([{"role": "user", "content": "hi"}], None)      # its greedy answer, or None: no room
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.conversations.services import values
from mobilellm.errors import UserError
from mobilellm.model.generation import Sampling
from mobilellm.runtimes.remembering import RememberingSession
from mobilellm.runtimes.running import RunningModel, generate
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import encode_prompt, ends_of_turn
from mobilellm.tokenizer.special_tokens import missing_tokens

RESAMPLES = 1000


class Asker:
    """A model that answers conversations, each by itself. What a conversation has in common with
    the one before, as the turns of a dialogue have, is read once."""

    def __init__(self, model: RunningModel, max_new_tokens: int) -> None:
        """The model's own chat template is taken, or ChatML, and so where tools are given."""
        self.model, self.max_new_tokens = model, max_new_tokens
        self.session = RememberingSession(model.session)
        self.plain = ChatTemplate.of(model.tokenizer)
        self.with_tools = ChatTemplate.for_tools(model.tokenizer)
        forms = (self.plain, self.with_tools)
        ends = {end for form in forms for end in ends_of_turn(model.tokenizer, form)}
        self.stop = sorted({*model.session.end_tokens, *ends})
        markers = dict.fromkeys(marker for form in forms for marker in form.markers())
        self.stop_texts = missing_tokens(model.tokenizer, list(markers))

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str | None:
        """The greedy answer; None where the conversation leaves no room in the context."""
        model, template = self.model, self.with_tools if tools else self.plain
        prompt = encode_prompt(model.tokenizer, template, messages, tools)
        room = min(self.max_new_tokens, self.session.context - len(prompt))
        if room < 1:
            return None
        fresh = self.session.fresh(prompt)
        tokens = list(generate(self.session, fresh, room, Sampling(), self.stop))
        text = model.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for one in self.stop_texts if (at := text.find(one)) >= 0]
        return text[: min(ends)] if ends else text


def rows_of(folder: Path | None, name: str) -> Iterable[tuple[Any, str]]:
    """The lines of a data file, plain or compressed. `UserError` where it is not."""
    if folder is None:
        raise UserError(f"{name} is read from a folder", hint="give --data FOLDER")
    for ending in (".jsonl", ".jsonl.gz"):
        if (folder / f"{name}{ending}").is_file():
            return values(folder / f"{name}{ending}")
    raise UserError(f"{folder}: has no {name}.jsonl or {name}.jsonl.gz")


def figure(scores: Sequence[float], groups: Sequence[Any], seed: int = 0) -> dict[str, Any]:
    """Mean in percent with its 95 % interval, by drawing whole groups again and again: values of
    one group (turns of a dialogue, instructions of a prompt) are not independent."""
    if not scores:
        return {"percent": None, "low": None, "high": None, "count": 0}
    _, which = np.unique([str(group) for group in groups], return_inverse=True)
    sums, sizes = np.bincount(which, scores), np.bincount(which)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    percent = [round(100 * float(x), 2) for x in (np.mean(scores), low, high)]
    return {"percent": percent[0], "low": percent[1], "high": percent[2], "count": len(scores)}
