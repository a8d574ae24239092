"""A model on prepared data or on a text: the tokens, the bytes behind them, and the checks that they belong together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mobilellm.data.token_folder import TokenFolder
from mobilellm.errors import UserError
from mobilellm.evaluate.perplexity import Score, TokenList, perplexity
from mobilellm.model.network import Network
from mobilellm.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]


def separator(tokenizer: Tokenizer) -> int | None:
    """The token put before a text by itself, so that its first token is predicted too: BOS where there is one, else EOS."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def document_border(data: TokenFolder) -> int | None:
    """The token put before prepared data: what stands before every document in training, the end of the one before it."""
    return data.eos_id if data.eos else None


def score_data(
    network: Network,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    sequence_length: int,
    stride: int = 0,
    progress: Progress | None = None,
) -> Score:
    """Score the held-out part of prepared data. `UserError` when it was made with another tokenizer."""
    data = TokenFolder.open(folder, verify=True)
    if data.tokenizer().sha256 != tokenizer.sha256:
        raise UserError(
            f"{folder}: made with tokenizer {data.tokenizer().sha256[:12]}, the model has {tokenizer.sha256[:12]}",
            hint="prepare the text again with --tokenizer MODEL, or score the text itself with --text",
        )
    stream = data.tokens("held_out")
    prefix = document_border(data)
    return perplexity(
        network,
        stream,
        data.text_bytes("held_out"),
        sequence_length=sequence_length,
        stride=stride,
        prefix=prefix,
        progress=progress,
    )


def score_text(
    network: Network,
    tokenizer: Tokenizer,
    path: Path,
    *,
    sequence_length: int,
    stride: int = 0,
    progress: Progress | None = None,
) -> Score:
    """Score a text file (UTF-8)."""
    text = read_text(path)
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int64)
    return perplexity(
        network, TokenList(tokens), len(text.encode()), sequence_length=sequence_length, stride=stride,
        prefix=separator(tokenizer), progress=progress,
    )  # fmt: skip


def read_text(path: Path) -> str:
    """A text file's content. `UserError` when it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}") from None
    if not text:
        raise UserError(f"{path}: empty")
    return text
