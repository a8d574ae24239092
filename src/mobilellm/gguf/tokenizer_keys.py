"""A tokenizer in GGUF's keys, in and out.

    tokenizer = read_keys(header.keys, Path("model.gguf"))
    notes = add_keys(writer, tokenizer, config)

GGUF numbers the types of its tokens as SentencePiece does (gguf's `TokenType`), so its pieces are
those of mobilellm.tokenizer.sentencepiece.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm.errors import UserError
from mobilellm.gguf.pre_tokenizers import named
from mobilellm.gguf.tokenizer_parts import (
    ByteLevelParts,
    byte_level_parts,
    byte_level_tokenizer,
    dropped_settings,
    is_sentencepiece,
    sentencepiece_parts,
)
from mobilellm.model.config import ModelConfig
from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer
from mobilellm.tokenizer.sentencepiece_model import BPE_MODEL, NORMAL, UNUSED, SentencePieceModel
from mobilellm.tokenizer.tokenizer import Tokenizer, templates_of

FILLER = "[PAD"  # begins the names of rows of the embedding that no token has


def read_keys(keys: dict[str, Any], path: Path) -> Tokenizer | None:
    """The tokenizer in the file, or None. `UserError` for kinds whose ids could not be equalled."""
    kind = keys.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab":
        return None
    pieces, types = _pieces(keys, path)
    ids = {name: keys.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    for i in ids.values():
        if i is not None and (not isinstance(i, int) or not 0 <= i < len(pieces)):
            raise UserError(
                f"{path}: a special token of its tokenizer is not among its {len(pieces)} tokens"
            )
    templates = _templates(keys)
    name = str(keys.get("general.name", path.stem))
    if kind == "llama":
        model = _sentencepiece(keys, pieces, types, ids, path)
        return Tokenizer(
            to_fast_tokenizer(model, str(path)),
            name=name,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            **templates,
        )
    pre = keys.get("tokenizer.ggml.pre", "default")
    merges = keys.get("tokenizer.ggml.merges")
    cut = named(str(pre))
    if (
        kind != "gpt2"
        or cut is None
        or not isinstance(merges, list)
        or not all(isinstance(m, str) for m in merges)
    ):
        raise UserError(
            f"{path}: a tokenizer of kind {str(kind)[:40]!r}, {str(pre)[:40]!r}, "
            "which cannot be rebuilt exactly",
            hint="give the model's own with --tokenizer",
        )
    parts = ByteLevelParts(pieces=pieces, types=types, merges=merges, cut=cut)
    return byte_level_tokenizer(
        parts,
        name=name,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        add_bos=bool(keys.get("tokenizer.ggml.add_bos_token", cut.names[0] == "llama-bpe")),
        **templates,
    )


def _templates(keys: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Tokenizer` that hold its chat templates: the one, and the named ones."""
    prefix = "tokenizer.chat_template"
    named = {key[len(prefix) + 1 :]: keys[key] for key in keys if key.startswith(f"{prefix}.")}
    named = templates_of(named)
    template = keys.get(prefix)
    return {
        "chat_template": template if isinstance(template, str) else named.pop("default", None),
        "named_templates": named,
    }


def _pieces(keys: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Pieces and their types, without those that only fill the rows of the embedding."""
    pieces, types = keys.get("tokenizer.ggml.tokens"), keys.get("tokenizer.ggml.token_type")
    if not isinstance(pieces, list) or not all(isinstance(p, str) for p in pieces) or not pieces:
        raise UserError(f"{path}: its tokenizer has no list of tokens")
    if not isinstance(types, list) or len(types) != len(pieces):
        types = [NORMAL] * len(pieces)
    if not all(type(kind) is int for kind in types):
        raise UserError(f"{path}: its tokenizer has a token whose type is no number")
    count = len(pieces)
    while count and types[count - 1] == UNUSED and pieces[count - 1].startswith(FILLER):
        count -= 1
    return pieces[:count], types[:count]


def _sentencepiece(
    keys: dict[str, Any],
    pieces: list[str],
    types: list[int],
    ids: dict[str, Any],
    path: Path,
) -> SentencePieceModel:
    """A tokenizer of the kind that GGUF calls "llama"."""
    scores = keys.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or len(scores) < len(pieces)
        or not all(isinstance(score, (int, float)) for score in scores)
    ):
        raise UserError(f"{path}: its tokenizer has no scores for its {len(pieces)} tokens")
    if len(set(pieces)) != len(pieces):
        raise UserError(f"{path}: a piece of its tokenizer occurs twice")
    unknown = keys.get("tokenizer.ggml.unknown_token_id", 0)
    return SentencePieceModel(
        pieces=pieces,
        scores=scores[: len(pieces)],
        types=types,
        model_type=BPE_MODEL,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        added_first=True,
        add_dummy_prefix=bool(keys.get("tokenizer.ggml.add_space_prefix", True)),
        unk_id=unknown if isinstance(unknown, int) and unknown < len(pieces) else 0,
        bos_id=ids["bos"] if keys.get("tokenizer.ggml.add_bos_token", True) else None,
        eos_id=ids["eos"],
    )


def add_keys(writer: Any, tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """Write a tokenizer's keys, with a piece for each of the embedding's rows.

    A second token that ends a text is written as the end of a turn, at which llama.cpp stops, too.

    Returns a line for each setting that GGUF cannot say. `UserError` where llama.cpp would cut text
    in another way.
    """
    rows, notes = config.vocab_size, dropped_settings(tokenizer)
    if is_sentencepiece(tokenizer):
        model = sentencepiece_parts(tokenizer)
        pieces, types, scores = model.pieces, model.types, model.scores
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(model.add_dummy_prefix)
        if model.unk_id is not None:
            writer.add_unk_token_id(model.unk_id)
        writer.add_token_scores(scores + [-1e4] * (rows - len(scores)))
    else:
        parts = byte_level_parts(tokenizer)
        pieces, types = parts.pieces, parts.types
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(parts.cut.names[0])
        writer.add_token_merges(parts.merges)
        notes += parts.notes
    writer.add_token_list(pieces + [f"{FILLER}{i}]" for i in range(len(pieces), rows)])
    writer.add_token_types(types + [UNUSED] * (rows - len(types)))
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        named = {"default": tokenizer.chat_template} | tokenizer.named_templates
        writer.add_chat_template([{"name": n, "template": t} for n, t in named.items()])
    others = [token for token in config.end_tokens if token not in (None, tokenizer.eos_id)]
    if others:
        writer.add_eot_token_id(others[0])
    if len(others) > 1:
        notes.append(f"GGUF names no more than two end tokens: {others[1:]} are left out")
    return notes
