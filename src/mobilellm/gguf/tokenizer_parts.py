"""A tokenizer taken apart into what GGUF stores, and put together again.

    parts = byte_level_parts(tokenizer)          # pieces, types, merges
    model = sentencepiece_parts(tokenizer)       # pieces, types, scores
    byte_level_tokenizer(parts, name="x", bos_id=None, eos_id=0, add_bos=False, chat_template=None)

GGUF names ways to cut text; it cannot describe one. A tokenizer that cuts text in a way without a
name there is refused, since llama.cpp would give other ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from mobilellm.errors import UserError
from mobilellm.gguf.pre_tokenizers import PreTokenizer, recognized
from mobilellm.tokenizer.sentencepiece import WORDS, splits_at_spaces
from mobilellm.tokenizer.sentencepiece_model import (
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

LOWEST_SCORE = -1e6  # below that of every piece that is merged


@dataclass(frozen=True, kw_only=True)
class ByteLevelParts:
    """A byte-level BPE."""

    pieces: list[str]
    types: list[int]
    merges: list[str]
    """Two pieces with a space between."""
    cut: PreTokenizer
    """How text is cut before merging."""
    notes: list[str] = field(default_factory=list)
    """What GGUF cannot say of the tokenizer."""


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer falls back to bytes, as SentencePiece does; others need not."""
    model = json.loads(tokenizer.fast.to_str())["model"]
    return bool(model.get("byte_fallback"))


def dropped_settings(tokenizer: Tokenizer) -> list[str]:
    """A line for each setting of a tokenizer that GGUF has no key for and that can change ids."""
    content = json.loads(tokenizer.fast.to_str())
    lines = []
    for name in ("lstrip", "rstrip", "single_word"):
        if found := [token["content"] for token in content["added_tokens"] if token[name]]:
            lines.append(
                f"GGUF cannot say {name}, which {', '.join(found[:5])} of the tokenizer has"
            )
    if content.get("normalizer") and (found := _after_normalizing(content)):
        lines.append(
            f"GGUF cannot say that {', '.join(found[:5])} is looked for in normalized text"
        )
    if (stage := _metaspace(content)) is not None:
        lines.append("llama.cpp puts a space before a text that begins with one, too")
        if stage.get("prepend_scheme") == "first" and content["added_tokens"]:
            lines.append("llama.cpp puts a space before a text that follows an added token, too")
    return lines


def unsayable(tokenizer: Tokenizer) -> list[str]:
    """A line for each thing of a tokenizer that can change ids and that GGUF cannot say.

    `UserError` for a tokenizer that cannot be written at all.
    """
    notes = [] if is_sentencepiece(tokenizer) else byte_level_parts(tokenizer).notes
    return dropped_settings(tokenizer) + notes


def _after_normalizing(content: dict[str, Any]) -> list[str]:
    """The added tokens that are looked for in normalized text."""
    return [token["content"] for token in content["added_tokens"] if token["normalized"]]


def _metaspace(content: dict[str, Any]) -> dict[str, Any] | None:
    """The Metaspace stage that puts a space before a text, or None."""
    for stage in _sequence(content.get("pre_tokenizer"), "pretokenizers"):
        if stage["type"] == "Metaspace" and stage.get("prepend_scheme", "always") != "never":
            return dict(stage)
    return None


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, which older files write as one string with a space."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _sequence(part: Any, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the single part, or nothing."""
    if not part:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _unnamed(tokenizer: Tokenizer, what: str) -> UserError:
    return UserError(
        f"tokenizer {tokenizer.name}: {what}, which has no name in GGUF", hint="convert --to hf"
    )


def _typed_pieces(tokenizer: Tokenizer, content: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Every piece by its id, and its type; pieces of one byte are not told apart here."""
    pieces, types = [""] * tokenizer.vocab_size, [NORMAL] * tokenizer.vocab_size
    for piece, i in content["model"]["vocab"].items():
        pieces[i] = piece
    for token in content["added_tokens"]:
        # llama.cpp looks for it before spaces become "▁".
        spelled = token["content"].replace(SPACE, " ") if token["normalized"] else token["content"]
        pieces[token["id"]] = spelled
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return pieces, types


def _check_merging(
    tokenizer: Tokenizer, content: dict[str, Any], ignore_merges: bool = False
) -> None:
    """`UserError` for settings of a BPE that llama.cpp's has not.

    `ignore_merges` is what llama.cpp does: it takes a word that is a piece as a whole. The
    tokenizer may say otherwise where every piece is what its own merges lead to.
    """
    model = content["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unnamed(tokenizer, f"its BPE has {name} = {model[name]!r}")
    own = bool(model.get("ignore_merges"))
    if own != ignore_merges and not _merges_reach_all(content):
        raise _unnamed(tokenizer, f"its BPE has ignore_merges = {own}")


def _merges_reach_all(content: dict[str, Any]) -> bool:
    """Whether the characters of each piece, merged, give that piece; added tokens left out."""
    from tokenizers import models

    model = content["model"]
    bpe = models.BPE(vocab=model["vocab"], merges=_merges(model))
    added = {token["content"] for token in content["added_tokens"]}
    return all(len(bpe.tokenize(piece)) == 1 for piece in model["vocab"].keys() - added)


def sentencepiece_parts(tokenizer: Tokenizer) -> SentencePieceModel:
    """Pieces with scores that order them as the merges do.

    `UserError` for another kind of tokenizer, and for one that changes or cuts text in a way that
    SentencePiece's BPE does not.
    """
    content = json.loads(tokenizer.fast.to_str())
    model = content["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise _unnamed(tokenizer, "not of the SentencePiece kind")
    _check_merging(tokenizer, content)
    vocab: dict[str, int] = model["vocab"]
    pieces, types = _typed_pieces(tokenizer, content)
    for piece, i in vocab.items():
        if types[i] == NORMAL and len(piece) == 6 and piece[:3] == "<0x" and piece[5] == ">":
            types[i] = BYTE
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = UNKNOWN
    if "" in pieces:
        raise UserError(f"tokenizer {tokenizer.name}: id {pieces.index('')} has no piece")
    parts = SentencePieceModel(
        pieces=pieces,
        scores=_scores(pieces, types, _merges(model)),
        types=types,
        model_type=BPE_MODEL,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        unk_id=vocab.get(model.get("unk_token") or ""),
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    parts.add_dummy_prefix = _puts_space_first(tokenizer, content, splits_at_spaces(parts))
    return parts


def _scores(pieces: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """A score for each piece, the higher the earlier it is merged.

    A trained model numbers its pieces in the order of their merges, and scores them by that
    number. Where this order holds, the scores are therefore the original ones.
    """
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    joined = [pieces[i] for i in normal if pieces[i] in order]
    natural = joined == sorted(joined, key=order.__getitem__)
    first = normal[0] if normal else 0
    scores = [0.0] * len(pieces)
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:  # taken out of a text first: its score must only be no other's
            scores[i] = LOWEST_SCORE - i
    for i in normal:
        scores[i] = -float(i - first) if natural else -float(order.get(pieces[i], len(order) + i))
    return scores


def _puts_space_first(tokenizer: Tokenizer, content: dict[str, Any], words_apart: bool) -> bool:
    """Whether a space is put before a text.

    A normalizer does that in the tokenizers of transformers 4, and Metaspace in those of
    transformers 5. `words_apart` says that no piece crosses a space, so that text may be cut there
    before it is tokenized. `UserError` for stages that do anything else.
    """
    prefix = escapes = False
    for stage in _sequence(content.get("normalizer"), "normalizers"):
        if stage["type"] == "Prepend" and stage["prepend"] == SPACE:
            prefix = True
        elif (
            stage["type"] == "Replace"
            and stage["pattern"] == {"String": " "}
            and stage["content"] == SPACE
        ):
            escapes = True
        else:
            raise _unnamed(tokenizer, f"its normalizer has a stage {stage['type']}")
    for stage in _sequence(content.get("pre_tokenizer"), "pretokenizers"):
        if stage["type"] == "Metaspace" and stage["replacement"] == SPACE:
            escapes = True
            prefix = prefix or stage.get("prepend_scheme", "always") != "never"
            cuts = stage.get("split", True)
        elif stage["type"] == "Split" and stage["pattern"] == {"String": " "} and escapes:
            cuts = False  # Gemma's: no plain space is left to cut at
        else:
            cuts = stage["type"] == "Split" and stage["pattern"] == {"Regex": WORDS}
            if not cuts:
                raise _unnamed(tokenizer, f"its pre-tokenizer has a stage {stage['type']}")
        if cuts and not words_apart:
            raise _unnamed(tokenizer, "it cuts text at spaces and has pieces with a space inside")
    if not escapes:
        raise _unnamed(tokenizer, f"it does not write spaces as {SPACE}")
    return prefix


def byte_level_parts(tokenizer: Tokenizer) -> ByteLevelParts:
    """`UserError` when the pre-tokenizer is none that llama.cpp has a name for."""
    content = json.loads(tokenizer.fast.to_str())
    model = content["model"]
    cut, notes = recognized(_sequence(content.get("pre_tokenizer"), "pretokenizers"))
    if model["type"] != "BPE" or cut is None:
        raise _unnamed(tokenizer, "it splits text in a way of its own")
    for stage in _sequence(content.get("normalizer"), "normalizers"):
        if stage["type"] != "NFC":
            raise _unnamed(tokenizer, f"its normalizer has a stage {stage['type']}")
        notes.append("llama.cpp does not normalize text (NFC), which the tokenizer does")
    _check_merging(tokenizer, content, cut.ignore_merges)
    pieces, types = _typed_pieces(tokenizer, content)
    merges = [f"{left} {right}" for left, right in _merges(model)]
    return ByteLevelParts(pieces=pieces, types=types, merges=merges, cut=cut, notes=notes)


def byte_level_tokenizer(
    parts: ByteLevelParts,
    *,
    name: str,
    bos_id: int | None,
    eos_id: int | None,
    add_bos: bool,
    chat_template: str | None,
    named_templates: dict[str, str] | None = None,
) -> Tokenizer:
    """The tokenizer that has these parts. `UserError` when they contradict each other."""
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as Fast

    vocab = {piece: i for i, piece in enumerate(parts.pieces)}
    if len(vocab) != len(parts.pieces):
        raise UserError(f"{name}: a piece of the tokenizer occurs twice")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in parts.merges)]
    try:
        fast = Fast(models.BPE(vocab=vocab, merges=merges, ignore_merges=parts.cut.ignore_merges))
    except Exception as error:  # the library's only kind: a merge names a piece that is not there
        raise UserError(
            f"{name}: the tokenizer's merges and pieces contradict each other ({error})"
        ) from None
    stages = parts.cut.stages()
    content = json.loads(fast.to_str())
    content["pre_tokenizer"] = (
        stages[0] if len(stages) == 1 else {"type": "Sequence", "pretokenizers": stages}
    )
    fast = Fast.from_str(json.dumps(content))
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
    return Tokenizer(
        fast,
        name=name,
        bos_id=bos_id,
        eos_id=eos_id,
        chat_template=chat_template,
        named_templates=named_templates,
    )
