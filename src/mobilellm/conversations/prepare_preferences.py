"""Pairs of answers to a token folder of rows, for training by preferences.

    manifest = prepare_preferences([Path("pairs.jsonl")], Path("data/pairs"), tokenizer=tokenizer)
    manifest["preferences"]          # how many pairs, and how full the rows are

A row has one more token than the sequence length and holds whole pairs, one after the other, each
as two documents: what was asked with the chosen answer, and with the rejected one. The answers
alone are trained on. Padding at a row's end belongs to its last document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.conversations.folder import Sink, check_given, make_folder, with_template
from mobilellm.conversations.pairs import Pair, read_pair
from mobilellm.data.manifest import SPLITS, ShardEntry
from mobilellm.data.shard_file import token_dtype
from mobilellm.data.writer import ShardWriter
from mobilellm.errors import UserError, located
from mobilellm.prepare.split_rule import SplitRule
from mobilellm.prepare.task_run import Count
from mobilellm.streams.places import Place
from mobilellm.tokenizer.chat_template import ChatTemplate
from mobilellm.tokenizer.conversation import (
    EncodedConversation,
    encode_conversation,
    encode_prompt,
)
from mobilellm.tokenizer.tokenizer import Tokenizer

SOURCE = "preferences"
OPEN_ROWS = 64
"""Rows that are being filled at once: a pair goes into the fullest that has room for it."""

EncodedPair = tuple[EncodedConversation, EncodedConversation]


@dataclass
class Row:
    """A row that is being filled."""

    answers: list[EncodedConversation] = field(default_factory=list)
    tokens: int = 0


class PairRows:
    """Packs the pairs of a split into rows."""

    def __init__(self, writer: ShardWriter, row: int) -> None:
        """A row has `row` tokens."""
        self.writer, self.row = writer, row
        self.open: list[Row] = []
        self.rows = self.padding = self.chosen_bytes = self.documents_per_row = 0

    def add(self, item: EncodedPair) -> tuple[int, int]:
        """Put a pair, which a row has room for, into one; returns its tokens and bytes of text."""
        tokens, size = (sum(len(a.ids) for a in item), sum(a.bytes for a in item))
        fitting = [row for row in self.open if row.tokens + tokens <= self.row]
        if fitting:
            best = max(fitting, key=lambda row: row.tokens)
        else:
            if len(self.open) == OPEN_ROWS:
                self._write(max(self.open, key=lambda row: row.tokens))
            self.open.append(best := Row())
        best.answers += item
        best.tokens += tokens
        self.chosen_bytes += item[0].bytes
        if best.tokens == self.row:
            self._write(best)
        return tokens, size

    def _write(self, row: Row) -> None:
        self.open = [other for other in self.open if other is not row]
        rest = self.row - row.tokens
        ids = [i for answer in row.answers for i in answer.ids]
        trained = [bit for answer in row.answers for bit in answer.trained]
        ends = np.cumsum([len(answer.ids) for answer in row.answers])
        ends[-1] += rest
        last = ids[-1:] * rest
        size = sum(answer.bytes for answer in row.answers)
        self.writer.add(ids + last, size, ends, trained + [False] * rest)
        self.rows += 1
        self.padding += rest
        self.documents_per_row = max(self.documents_per_row, len(row.answers))

    def close(self) -> list[ShardEntry]:
        """Write the rows that are left; returns the manifest entries of the shards."""
        for row in self.open:
            self._write(row)
        return self.writer.close()


def prepare_preferences(
    files: Sequence[Place],
    out: Path,
    *,
    tokenizer: Tokenizer,
    template: Path | None = None,
    sequence_length: int = 2048,
    held_out: float = 0.01,
    seed: int = 0,
    on_bad: str = "stop",
) -> dict[str, Any]:
    """Make the token folder `out` of pairs in files of JSON lines; returns the manifest.

    Options as `prepare_chat`. A pair is whole or not there: one that is longer than a row is bad.
    """
    check_given(files, out, held_out, "pairs of answers")
    tokenizer, form, template_facts = with_template(tokenizer, template)
    rule = SplitRule(rule="documents", fraction=held_out, seed=seed)
    dtype, row_tokens = token_dtype(tokenizer.vocab_size), sequence_length + 1
    packed: dict[str, PairRows] = {}

    def encode(row: Any, where: str) -> EncodedPair:
        pair = read_pair(row, where)
        answers = [
            _answer(tokenizer, form, pair, answer, where) for answer in (pair.chosen, pair.rejected)
        ]
        tokens = sum(len(answer.ids) for answer in answers)
        if tokens > row_tokens:
            raise UserError(
                f"{where}: {tokens:,} tokens in both answers, a row has {row_tokens:,}",
                hint="give a longer --sequence-length, or --on-bad skip",
            )
        return answers[0], answers[1]

    def sinks(work: Path) -> dict[str, Sink[EncodedPair]]:
        packed.update(
            (s, PairRows(ShardWriter(work, s, SOURCE, dtype), row_tokens)) for s in SPLITS
        )
        return dict(packed)

    def facts(count: Count) -> dict[str, Any]:
        found = {
            "pairs": count.documents,
            "left_out": count.bad,
            "rows": {split: rows.rows for split, rows in packed.items()},
            "padding_tokens": {split: rows.padding for split, rows in packed.items()},
            "chosen_bytes": {split: rows.chosen_bytes for split, rows in packed.items()},
            "documents_per_row": max(rows.documents_per_row for rows in packed.values()),
        }
        return {"row": row_tokens, "preferences": found | template_facts}

    return make_folder(files, out, SOURCE, tokenizer, rule, on_bad, encode, sinks, facts)


def _answer(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    pair: Pair,
    answer: list[dict[str, Any]],
    where: str,
) -> EncodedConversation:
    """The conversation with an answer, of which the answer alone is trained on."""
    messages = [*pair.asked, *answer]
    with located(where):
        template.check_written(messages, pair.tools)
        encoded = encode_conversation(tokenizer, template, messages, pair.tools)
        asked = len(encode_prompt(tokenizer, template, pair.asked, pair.tools))
    earlier = any(message["role"] == "assistant" for message in pair.asked)
    if not earlier:
        said = encoded
    else:
        alone = encode_conversation(tokenizer, template, pair.asked, pair.tools)
        trained = [False] * asked + encoded.trained[asked:]
        said = EncodedConversation(encoded.ids, trained, encoded.bytes - alone.bytes)
    if not any(said.trained):
        raise UserError(f"{where}: the template marks no token of the assistant")
    return said
