"""Rows of the original's layout: a sample of token ids a line, in files of JSON lines.

    {"token_ids": [1, 15043, ...], "source": "c4"}

They share their suffix with documents, and a file may hold both, so that it is the line that tells
which it is: the reader of JSON lines asks `holds_ids` of each line without a text.
"""

from __future__ import annotations

from typing import Any

from mobilellm.data.layout import sample_of
from mobilellm.errors import UserError
from mobilellm.readers.reader import ReadSettings, Record


def holds_ids(row: Any, settings: ReadSettings) -> bool:
    """Whether a parsed line is a sample of token ids."""
    return isinstance(row, dict) and "token_ids" in row and settings.text_field not in row


def fill(record: Record, row: Any, where: str, settings: ReadSettings) -> None:
    """Put a sample's ids and source into its record.

    `UserError` where no tokenizer is known, and for ids out of range or too few or many of them.
    """
    if settings.vocab_size is None:
        raise UserError(
            f"{where}: token ids, and no tokenizer named", hint="name theirs with --tokenizer"
        )
    record.ids, record.source = sample_of(row, where, settings.vocab_size)
    if len(record.ids) not in settings.sample_lengths:
        allowed = " or ".join(map(str, settings.sample_lengths))
        raise UserError(
            f"{where}: {len(record.ids)} ids, a sample has {allowed}",
            hint="or give --sequence-length",
        )
