"""A fast tokenizer, with the same ids, from a SentencePiece model: BPE (the Llama and Mistral kind)
or Unigram, with byte fallback or without.

    model = read_model(Path("tokenizer.model"))
    fast = to_fast_tokenizer(model)          # a tokenizers.Tokenizer

SentencePiece's BPE joins, again and again, the neighbours whose joint piece has the highest score,
the leftmost first among equals. As a list of merges that is every split of every piece into two
others, ordered by the piece's score. Unigram takes the cut of the highest sum of scores, which the
tokenizers library does, too (tokenizer/sentencepiece_stages.py). Models for which this would not
give SentencePiece's own ids are refused.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from mobilellm.errors import UserError
from mobilellm.tokenizer.sentencepiece_model import (
    BPE_MODEL,
    BYTE,
    CONTROL,
    LONGEST_PIECE,
    NORMAL,
    SPACE,
    UNIGRAM_MODEL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from mobilellm.tokenizer.sentencepiece_stages import (
    UNKNOWN_CHARACTER,
    normalizer,
    uncovered,
    unigram,
)

if TYPE_CHECKING:
    import tokenizers

WORDS = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"  # what text is cut into where no piece crosses a space


def check_supported(model: SentencePieceModel, where: str = "tokenizer.model") -> None:
    """`UserError` unless the fast tokenizer gives this model's ids exactly."""
    # Every way to divide a piece is looked at: of one of millions of characters, for hours.
    if (longest := max(map(len, model.pieces))) > LONGEST_PIECE:
        raise UserError(
            f"{where}: a piece of {longest:,} characters, the limit is {LONGEST_PIECE}",
            hint="is the file damaged?",
        )
    kinds = set(model.types)
    typed = list(zip(model.pieces, model.types, strict=True))
    by_score = model.model_type == UNIGRAM_MODEL
    equals = [] if by_score else tied(model)
    changes = model.remove_extra_whitespaces or bool(model.charsmap)
    for fault, what in (
        (not by_score and model.model_type != BPE_MODEL, "neither a BPE nor a Unigram model"),
        (not kinds & {NORMAL, USER_DEFINED, UNUSED}, "no piece of text"),
        (
            USER_DEFINED in kinds and (by_score or changes),
            "user-defined pieces in a Unigram model, or beside a normalization of text",
        ),
        (
            (by_score or not model.byte_fallback) and bool(lone(model)),
            f"characters of pieces that are no pieces ({''.join(lone(model)[:5])})",
        ),
        (not model.escape_whitespaces, "does not escape spaces"),
        (model.whitespace_suffix, "spaces after words"),
        # SentencePiece puts its space before a text first and looks for these pieces then; added
        # tokens of the tokenizers library are looked for first. Without that space the two come to
        # the same.
        (
            USER_DEFINED in kinds and model.add_dummy_prefix and not model.added_first,
            "user-defined pieces together with a space before the text",
        ),
        (
            any(" " in piece for piece, kind in typed if kind == USER_DEFINED)
            and not model.added_first,
            "a user-defined piece with a plain space",
        ),
        (UNUSED in kinds and not model.added_first, "unused pieces"),
        (model.unk_id is None or model.types.count(UNKNOWN) > 1, "no unknown piece, or several"),
        # A character of the text that is itself such a piece is spelt in bytes there, and would be
        # that piece here.
        (
            any(len(piece) == 1 for piece, kind in typed if kind in (CONTROL, UNKNOWN))
            and not model.added_first,
            "a control piece of one character",
        ),
        (
            bool(equals),
            f"pieces of equal score ({', '.join(map(repr, equals[:2]))})",
        ),
    ):
        if fault:
            raise UserError(
                f"{where}: {what}, which cannot be converted exactly",
                hint=(
                    "use a BPE or Unigram model of SentencePiece's defaults, or a tokenizer.json"
                ),
            )
    if not model.byte_fallback:
        return
    found = {piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == BYTE}
    if missing := sorted({f"<0x{byte:02X}>" for byte in range(256)} - found):
        raise UserError(f"{where}: {len(missing)} byte pieces are missing, {missing[0]} the first")


def lone(model: SentencePieceModel) -> list[str]:
    """Characters of pieces that are no pieces themselves, which training leaves none of."""
    normal = {p for p, kind in zip(model.pieces, model.types, strict=True) if kind == NORMAL}
    return sorted(set("".join(normal)) - normal)


def joinable(model: SentencePieceModel) -> dict[str, float]:
    """The pieces that others can be joined to, and single characters, with their scores."""
    typed = list(zip(model.pieces, model.scores, model.types, strict=True))
    found = {piece: score for piece, score, kind in typed if kind == NORMAL}
    if model.added_first:
        every = {piece: score for piece, score, _ in typed}
        found |= {
            piece: score
            for piece, score, kind in typed
            if kind != NORMAL
            and any(piece[:cut] in every and piece[cut:] in every for cut in range(1, len(piece)))
        }
    return found


def tied(model: SentencePieceModel) -> list[str]:
    """Pieces that compete with another of the same score; runs of spaces, which `check_runs`
    tries, left out.

    SentencePiece joins the leftmost of equals, merges are taken in their order. The score of a
    single character does not count: nothing is joined into it.
    """
    scored = [(s, p) for p, s in joinable(model).items() if len(p) > 1]
    groups = [
        [p for _, p in group]
        for _, group in itertools.groupby(sorted(scored), key=lambda pair: pair[0])
    ]
    return [
        p
        for group in groups
        if len(group) > 1 and any(p.strip(SPACE) for p in group)
        for p in group
    ]


def best_first(score: dict[str, float], text: str) -> list[str]:
    """What SentencePiece joins `text` to, step by step: slow, and plainly its definition."""
    parts = list(text)
    while pairs := [
        (-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score
    ]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def check_runs(model: SentencePieceModel, bpe: Any, where: str) -> None:
    """`UserError` unless runs of spaces, whose pieces Llama and Mistral give one score (-1e9),
    are joined the same way.

    How a run is joined depends on its length alone. Both ways fill it with the longest piece
    from the left and differ, if they do, in what is left over; so every length up to four times
    the longest piece is tried.
    """
    score = joinable(model)
    longest = max((len(piece) for piece in score if not piece.strip(SPACE)), default=0)
    for length in range(2, 4 * min(longest, 32) + 1):  # pieces of more than 32 spaces: unheard of
        run = SPACE * length
        if SPACE in score and [token.value for token in bpe.tokenize(run)] != best_first(
            score, run
        ):
            raise UserError(
                f"{where}: runs of {length} spaces, whose pieces have one score, cannot be "
                "converted exactly",
                hint="use a tokenizer.json",
            )


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best first."""
    score = joinable(model)
    ordered = sorted(score, key=lambda piece: -score[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def splits_at_spaces(model: SentencePieceModel) -> bool:
    """Whether no piece has a space after another character.

    Then nothing is ever joined across such a place, and text can be cut there before tokenizing
    with no change to the ids: words are looked up in a cache, and a long document is no longer
    one word.
    """
    return not any(
        SPACE in piece.lstrip(SPACE)
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind == NORMAL
    )


def to_fast_tokenizer(
    model: SentencePieceModel, where: str = "tokenizer.model"
) -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library. `UserError` for models it could not
    equal."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    check_supported(model, where)
    assert model.unk_id is not None
    unknown = model.pieces[model.unk_id]
    cuts = [pre_tokenizers.Split(Regex(WORDS), "isolated")] if splits_at_spaces(model) else []
    if model.model_type == UNIGRAM_MODEL:
        fast = Tokenizer(unigram(model))
        # No piece has such a character, so that nothing is lost by cutting there.
        cuts = [pre_tokenizers.Split(Regex(uncovered(model)), "isolated"), *cuts]
    else:
        bpe = models.BPE(
            vocab={piece: i for i, piece in enumerate(model.pieces)},
            merges=merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
        check_runs(model, bpe, where)
        fast = Tokenizer(bpe)
    fast.normalizer = normalizer(model, where)
    if cuts:
        fast.pre_tokenizer = cuts[0] if len(cuts) == 1 else pre_tokenizers.Sequence(cuts)
    # Where SentencePiece keeps no spaces before a text, it decodes to none.
    spaces = LONGEST_PIECE if model.remove_extra_whitespaces else int(model.add_dummy_prefix)
    strip = [decoders.Strip(" ", spaces, 0)] if spaces else []
    of_bytes = [decoders.ByteFallback()] if model.byte_fallback else []
    # What an unknown piece decodes to has spaces around it, which are not those before the text.
    marked = [] if model.byte_fallback else [decoders.Replace(unknown, UNKNOWN_CHARACTER)]
    shown = [decoders.Replace(UNKNOWN_CHARACTER, model.unk_surface) for _ in marked]
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), *marked, *of_bytes, decoders.Fuse(), *strip, *shown]
    )
    user_defined = [
        p for p, kind in zip(model.pieces, model.types, strict=True) if kind == USER_DEFINED
    ]
    # Normalized: they are looked for where spaces are "▁" already, as the pieces spell them.
    late = not model.added_first
    fast.add_tokens([AddedToken(piece, special=False, normalized=late) for piece in user_defined])
    control = [
        p for p, kind in zip(model.pieces, model.types, strict=True) if kind in (CONTROL, UNKNOWN)
    ]
    if (
        model.bos_id is not None
    ):  # as the Llama family does: one BOS before a text that is tokenized by itself
        bos = model.pieces[model.bos_id]
        fast.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, model.bos_id)]
        )
    fast.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    return fast
