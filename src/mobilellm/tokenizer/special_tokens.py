"""Special tokens: which a tokenizer has, and how it gets those that a chat template needs.

    tokenizer, added = with_special_tokens(tokenizer, ["<|im_start|>", "<|im_end|>"])
    added                  # {"<|im_start|>": "renamed", "<|im_end|>": "appended"}

A tokenizer that is trained here can keep rows free (`train_bpe(..., reserved=32)`): a new special
token takes the name of one, so that a model that was trained with them needs no new row. Where
none is left the token is appended, and the vocabulary grows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from mobilellm.errors import UserError
from mobilellm.tokenizer.tokenizer import RESERVED, Tokenizer

MAX_TOKEN = 128  # characters of a special token
RESERVED_NAME = re.compile(re.escape(RESERVED).replace(r"\{\}", r"\d+"))


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of the tokens that a document's text never becomes."""
    found = tokenizer.fast.get_added_tokens_decoder()
    return {token.content: int(i) for i, token in found.items() if token.special and token.content}


def missing_tokens(tokenizer: Tokenizer, wanted: Sequence[str]) -> list[str]:
    """Those that are no special tokens of the tokenizer, each once."""
    have = special_tokens(tokenizer)
    return [token for token in dict.fromkeys(wanted) if token not in have]


def is_reserved(token: str | None) -> bool:
    """Whether a token keeps a row free."""
    return token is not None and RESERVED_NAME.fullmatch(token) is not None


def with_special_tokens(
    tokenizer: Tokenizer, wanted: Sequence[str]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer with these special tokens, and how each that it lacked came in: "renamed" (a
    reserved row) or "appended" (the vocabulary grows).

    All other ids stay. `UserError` for an empty name, and for the text of a token that is not
    special.
    """
    have, vocabulary = special_tokens(tokenizer), tokenizer.fast.get_vocab(with_added_tokens=True)
    missing = missing_tokens(tokenizer, wanted)
    for token in missing:
        if not token.strip() or len(token) > MAX_TOKEN:
            raise UserError(f"special token {token[:40]!r}: must have 1 to {MAX_TOKEN} characters")
        if token in vocabulary:
            raise UserError(
                f"special token {token!r}: a token of tokenizer {tokenizer.name!r}, but not special"
            )
    if not missing:
        return tokenizer, {}
    free = [token for token in have if is_reserved(token)]
    renamed = dict(zip(free, missing, strict=False))
    appended = missing[len(renamed) :]
    fast = renamed_tokens(tokenizer, lambda token: renamed.get(token, token))
    from tokenizers import AddedToken

    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in appended])
    for old, new in renamed.items():
        if fast.token_to_id(new) != have[old]:
            raise UserError(f"tokenizer {tokenizer.name!r}: cannot rename its token {old!r}")
    how = dict.fromkeys(renamed.values(), "renamed") | dict.fromkeys(appended, "appended")
    return tokenizer.replaced(fast), {token: how[token] for token in missing}


def renamed_tokens(tokenizer: Tokenizer, rename: Callable[[str], str]) -> Any:
    """A copy of the library's tokenizer whose special tokens have other names, and the same ids.

    `rename` gives the new name of each special token.
    """
    from tokenizers import Tokenizer as Fast

    content = json.loads(tokenizer.fast.to_str())
    names = {token: rename(token) for token in special_tokens(tokenizer)}
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    content["post_processor"] = _renamed_processor(content.get("post_processor"), names)
    return Fast.from_str(json.dumps(content))


def _renamed_processor(value: Any, names: dict[str, str]) -> Any:
    """The post-processor, whose strings name special tokens."""
    if isinstance(value, dict):
        return {names.get(k, k): _renamed_processor(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed_processor(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value
