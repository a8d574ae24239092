"""A tokenizer taken apart into what GGUF and llama2.c store: pieces, scores, types, merges; and put together again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mobilellm.errors import UserError
from mobilellm.tokenizer.sentencepiece import (
    BPE_MODEL,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
)
from mobilellm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ByteLevelParts:
    """A byte-level BPE."""

    pieces: list[str]
    types: list[int]
    merges: list[str]
    """Two pieces with a space between."""
    digits_alone: bool
    """Whether each digit is a piece of its own (SmolLM's way); else as GPT-2."""


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer falls back to bytes as SentencePiece does; a byte-level one has none to fall back from."""
    model = json.loads(tokenizer.fast.to_str())["model"]
    return bool(model.get("byte_fallback"))


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files write as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def sentencepiece_parts(tokenizer: Tokenizer) -> SentencePieceModel:
    """Pieces with scores that order them as the merges do. `UserError` for another kind of tokenizer."""
    content = json.loads(tokenizer.fast.to_str())
    model = content["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"tokenizer {tokenizer.name}: not of the SentencePiece kind",
            hint="convert --to hf or gguf",
        )
    vocab: dict[str, int] = model["vocab"]
    size = tokenizer.vocab_size
    pieces, scores, types = [""] * size, [0.0] * size, [NORMAL] * size
    for piece, i in vocab.items():
        pieces[i] = piece
        types[i] = (
            BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL
        )
    for token in content["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    if "" in pieces:
        raise UserError(f"tokenizer {tokenizer.name}: id {pieces.index('')} has no piece")
    order: dict[str, int] = {}
    for left, right in _merges(model):
        order.setdefault(left + right, len(order))
    normal = [i for i in range(size) if types[i] == NORMAL]
    # A trained model numbers its pieces in the order of their merges, and scores them by that number: keep to it where it
    # holds, so that the scores are the original ones.
    joined = [pieces[i] for i in normal if pieces[i] in order]
    natural = joined == sorted(joined, key=order.__getitem__)
    first = normal[0] if normal else 0
    for i in normal:
        scores[i] = -float(i - first) if natural else -float(order.get(pieces[i], len(order) + i))
    prefix = any(
        "Prepend" in json.dumps(part)
        for part in _sequence(content.get("normalizer"), "normalizers")
    )
    return SentencePieceModel(
        pieces=pieces, scores=scores, types=types, model_type=BPE_MODEL, byte_fallback=True, remove_extra_whitespaces=False,
        unk_id=vocab.get(model.get("unk_token") or ""), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, add_dummy_prefix=prefix,
    )  # fmt: skip


def _sequence(part: Any, key: str) -> list[Any]:
    """The members of a Sequence, or the single part, or nothing."""
    if not part:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def byte_level_parts(tokenizer: Tokenizer) -> ByteLevelParts:
    """`UserError` when the pre-tokenizer is not one that llama.cpp knows as "gpt-2" or "smollm"."""
    content = json.loads(tokenizer.fast.to_str())
    model = content["model"]
    stages = _sequence(content.get("pre_tokenizer"), "pretokenizers")
    digits = stages[:1] and stages[0]["type"] == "Digits" and stages[0].get("individual_digits")
    rest = stages[1:] if digits else stages
    known = (
        len(rest) == 1
        and rest[0]["type"] == "ByteLevel"
        and not rest[0].get("add_prefix_space")
        and rest[0].get("use_regex", True)
    )
    if model["type"] != "BPE" or not known or content.get("normalizer"):
        raise UserError(
            f"tokenizer {tokenizer.name}: splits text in a way that has no name in GGUF",
            hint="convert --to hf",
        )
    pieces, types = [""] * tokenizer.vocab_size, [NORMAL] * tokenizer.vocab_size
    for piece, i in model["vocab"].items():
        pieces[i] = piece
    for token in content["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return ByteLevelParts(pieces=pieces, types=types, merges=merges, digits_alone=bool(digits))


def byte_level_tokenizer(
    parts: ByteLevelParts,
    *,
    name: str,
    bos_id: int | None,
    eos_id: int | None,
    add_bos: bool,
    chat_template: str | None,
) -> Tokenizer:
    """The tokenizer these parts belong to."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    vocab = {piece: i for i, piece in enumerate(parts.pieces)}
    if len(vocab) != len(parts.pieces):
        raise UserError(f"{name}: a piece of the tokenizer occurs twice")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in parts.merges)]
    try:
        fast = Fast(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library's only kind: a merge names a piece that is not there
        raise UserError(
            f"{name}: the tokenizer's merges and pieces contradict each other ({error})"
        ) from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    fast.pre_tokenizer = (
        pre_tokenizers.Sequence([digits, byte_level]) if parts.digits_alone else byte_level
    )
    fast.decoder = decoders.ByteLevel()
    if add_bos and bos_id is not None:
        bos = parts.pieces[bos_id]
        fast.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        found = [
            AddedToken(p, special=special, normalized=False)
            for p, t in zip(parts.pieces, parts.types, strict=True)
            if t == kind
        ]
        (fast.add_special_tokens if special else fast.add_tokens)(found)
    return Tokenizer(fast, name=name, bos_id=bos_id, eos_id=eos_id, chat_template=chat_template)


__all__ = [
    "SPACE",
    "ByteLevelParts",
    "byte_level_parts",
    "byte_level_tokenizer",
    "is_sentencepiece",
    "sentencepiece_parts",
]
