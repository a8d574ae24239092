"""Conversations to a token folder whose mask holds what the assistant says.

    manifest = prepare_chat([Path("talks.jsonl")], Path("data/talks"), tokenizer=tokenizer)
    manifest["conversations"]        # how many came whole, shortened, or not at all

Each conversation is a document, so that `--mask-documents` of training keeps them apart. One that
is longer than the context loses its last turns as a whole, and is counted.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mobilellm.conversations.folder import Sink, check_given, make_folder, with_template
from mobilellm.conversations.forms import Conversation, read_conversation
from mobilellm.conversations.services import split_services
from mobilellm.data.manifest import SPLITS, ShardEntry
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError, located
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import Count
from mobilellm.streams.places import Place
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import EncodedConversation, encode_conversation
from mobilellm.tokenizer.tokenizer import Tokenizer

SOURCE = "chat"


@dataclass
class Tally:
    """What became of the conversations, and of their tokens."""

    whole: int = 0
    shortened: int = 0
    """Without their last turns, which the context has no room for."""
    messages_left_out: int = 0
    """Of those that were shortened."""
    left_out: int = 0
    """Bad ones, or without a turn of the assistant within the context."""
    trained_tokens: int = 0


class Conversations:
    """Each a document of the shards of a split."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer

    def add(self, item: EncodedConversation) -> tuple[int, int]:
        """Write one; returns its tokens and its bytes of text."""
        self.writer.add(item.ids, item.bytes, trained=item.trained)
        return len(item.ids), item.bytes

    def close(self) -> list[ShardEntry]:
        """The manifest entries of the shards."""
        return self.writer.close()


def prepare_chat(
    files: Sequence[Place],
    out: Path,
    *,
    tokenizer: Tokenizer,
    template: Path | None = None,
    context: int = 2048,
    held_out: float = 0.01,
    seed: int = 0,
    on_bad: str = "stop",
) -> dict[str, Any]:
    """Make the token folder `out` of files of JSON lines; returns the manifest.

    `template` is a Jinja file; without it the tokenizer's own is taken, or ChatML. `on_bad` "skip"
    counts a bad conversation and goes on; "stop" raises. `UserError` names file and line.

    Files that define services (Schema-Guided Dialogue's schema) give the dialogues their tools.

    Special tokens that the template spells and the tokenizer lacks take reserved rows, or are
    appended; the folder's tokenizer has them, and the template.
    """
    check_given(files, out, held_out, "conversations")
    services, files = split_services(files)
    if not files:
        raise UserError("definitions of services alone", hint="give dialogues, too")
    tokenizer, form, template_facts = with_template(tokenizer, template)
    rule = SplitRule(rule="documents", fraction=held_out, seed=seed)
    dtype, tally = token_dtype(tokenizer.vocab_size), Tally()

    def encode(row: Any, where: str) -> EncodedConversation:
        talk = read_conversation(row, where, services)
        encoded, dropped = _fitted(tokenizer, form, talk, context, where)
        tally.whole += not dropped
        tally.shortened += bool(dropped)
        tally.messages_left_out += dropped
        tally.trained_tokens += sum(encoded.trained)
        return encoded

    def sinks(work: Path) -> dict[str, Sink[EncodedConversation]]:
        return {s: Conversations(ShardWriter(work, s, SOURCE, dtype)) for s in SPLITS}

    def facts(count: Count) -> dict[str, Any]:
        tally.left_out = count.bad
        return {"conversations": asdict(tally) | {"context": context} | template_facts}

    return make_folder(files, out, SOURCE, tokenizer, rule, on_bad, encode, sinks, facts)


def _fitted(
    tokenizer: Tokenizer, template: ChatTemplate, talk: Conversation, context: int, where: str
) -> tuple[EncodedConversation, int]:
    """The conversation in tokens, and how many of its last messages had to go for it to fit."""
    messages = talk.messages
    ends = [n for n, m in enumerate(messages, 1) if m["role"] == "assistant"]

    @functools.cache
    def encoded(end: int) -> EncodedConversation:
        with located(where):
            found = encode_conversation(tokenizer, template, messages[:end], talk.tools)
        if not any(found.trained):
            raise UserError(f"{where}: the template marks no token of the assistant")
        return found

    with located(where):
        template.check_written(messages, talk.tools)
    whole = encoded(len(messages))
    if len(whole.ids) <= context:
        return whole, 0
    # The text of fewer messages begins that of more, or `encode_conversation` refuses it, so that
    # more never have fewer tokens.
    fitting = bisect.bisect_right(ends, context, key=lambda end: len(encoded(end).ids))
    if fitting:
        return encoded(ends[fitting - 1]), len(messages) - ends[fitting - 1]
    least = len(encoded(ends[0]).ids)
    raise UserError(
        f"{where}: {least:,} tokens up to the first answer, the context has {context:,}",
        hint="give a longer --sequence-length, or --on-bad skip",
    )
