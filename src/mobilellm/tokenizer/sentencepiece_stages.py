"""Stages of the tokenizers library that do what SentencePiece does: normalization and Unigram.

    stage = normalizer(model)         # of a SentencePieceModel, for the library's Tokenizer
    pieces = unigram(model)

SentencePiece replaces the longest known sequence of characters at each place, the library what it
knows of a user-perceived character (a grapheme). They come to the same but where such a character
is made of several that are replaced one by one: conjoining jamo, a voicing mark after half-width
kana, two combining marks of which one is replaced. Those alone can get other ids.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np

from mobilellm.errors import UserError
from mobilellm.tokenizer.sentencepiece_model import (
    NORMAL,
    SPACE,
    UNIGRAM_MODEL,
    SentencePieceModel,
)

UNKNOWN_CHARACTER = "\U0010fffd"  # of a private plane: no text and no piece has it


def normalizer(model: SentencePieceModel, where: str = "tokenizer.model") -> Any:
    """What is done to a text before it is cut: SentencePiece's own steps in its order.

    `UserError` for a table of characters that is damaged.
    """
    from tokenizers import Regex, normalizers

    stages: list[Any] = []
    if model.charsmap:
        if not is_whole(model.charsmap):
            raise UserError(
                f"{where}: its character normalization ({model.normalizer_name or 'unnamed'}) is "
                "damaged",
                hint="fetch the file again",
            )
        mapped = normalizers.Precompiled(model.charsmap)
        if mapped.normalize_str("\r") != "\r" and mapped.normalize_str("\n") != "\n":
            stages.append(normalizers.Replace("\r\n", "\n\n"))  # both, not one for the two
        stages.append(mapped)
    if model.remove_extra_whitespaces:
        stages += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if model.add_dummy_prefix:
        stages.append(normalizers.Prepend(SPACE))
    stages += [normalizers.Replace(piece, UNKNOWN_CHARACTER) for piece in _hidden(model)]
    stages.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        stages.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(stages)


def is_whole(charsmap: bytes) -> bool:
    """Whether a table of characters leads nowhere outside itself.

    It is the size of a double-array trie in bytes, the trie's units of 32 bits, and the texts that
    its leaves name by their places, each ended by a zero byte (Darts-clone's format).
    """
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size < 1024 or size % 4 or size > len(charsmap) - 4:
        return False
    units = np.frombuffer(charsmap, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    texts = charsmap[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError:
        return False
    leaf = units >> 31 == 1
    inner, places = units[~leaf], np.arange(len(units))[~leaf]
    follow = places ^ (inner >> 10 << ((inner & 512) >> 6))  # where a unit's children begin
    if leaf[0] or int((follow | 255).max(initial=0)) >= len(units):
        return False
    named = follow[(inner >> 8 & 1) == 1]  # each holds the place of a text
    values = units[named] & 0x7FFFFFFF
    if int(values.max(initial=-1)) >= len(texts):
        return False
    starts = np.frombuffer(texts, dtype=np.uint8)[values]
    return bool(((starts & 0xC0) != 0x80).all())  # not within a character


def unigram(model: SentencePieceModel) -> Any:
    """The library's Unigram model.

    SentencePiece looks for ordinary pieces alone; the library looks for all of its vocabulary. So
    the others get a score below that of any way to spell them, with which the library also reckons
    for characters that no piece has: since nothing else covers those, that changes no choice.
    """
    from tokenizers import models

    typed = list(zip(model.pieces, model.scores, model.types, strict=True))
    scores = {piece: score for piece, score, kind in typed if kind == NORMAL}
    longest = max((len(piece) for piece, _, kind in typed if kind != NORMAL), default=0)
    below = longest * min(0.0, *scores.values(), 0.0) - 1.0
    vocabulary = [(piece, scores.get(piece, below)) for piece in model.pieces]
    return models.Unigram(vocabulary, unk_id=model.unk_id, byte_fallback=model.byte_fallback)


def _characters(model: SentencePieceModel) -> set[str]:
    """The characters of ordinary pieces."""
    typed = zip(model.pieces, model.types, strict=True)
    return {character for piece, kind in typed if kind == NORMAL for character in piece}


def _hidden(model: SentencePieceModel) -> list[str]:
    """Pieces that a text must not give (<s>), of characters that no ordinary piece has.

    To SentencePiece they are unknown characters like any; so they become one.
    """
    if model.model_type != UNIGRAM_MODEL or model.byte_fallback:
        return []
    known = _characters(model)
    typed = zip(model.pieces, model.types, strict=True)
    return [piece for piece, kind in typed if kind != NORMAL and not set(piece) & known]


def uncovered(model: SentencePieceModel) -> str:
    """A regular expression for characters that no piece has: a run of them, which is one unknown
    piece, or with byte fallback each."""
    codes = sorted(map(ord, _characters(model)))
    runs = [list(run) for _, run in groupby(enumerate(codes), key=lambda pair: pair[1] - pair[0])]
    ranges = "".join(rf"\x{{{run[0][1]:x}}}-\x{{{run[-1][1]:x}}}" for run in runs)
    return f"[^{ranges}]" + ("" if model.byte_fallback else "+")
