"""Fixtures of the tests of this room."""

from __future__ import annotations

import pytest

from mobilellm.tokenizer.chat_template import CHATML_TOKENS
from mobilellm.tokenizer.special_tokens import with_special_tokens
from mobilellm.tokenizer.tokenizer import Tokenizer, train_bpe


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small vocabulary with the markers of ChatML."""
    base = train_bpe(["the fox and the hen said what is a fox an animal " * 20], 320)
    return with_special_tokens(base, CHATML_TOKENS)[0]
