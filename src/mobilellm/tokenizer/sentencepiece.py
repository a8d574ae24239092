"""A fast tokenizer, with the same ids, from a SentencePiece BPE model with byte fallback (the
Llama and Mistral kind).

    model = read_model(Path("tokenizer.model"))
    fast = to_fast_tokenizer(model)          # a tokenizers.Tokenizer

The model file is a protobuf message (sentencepiece_model.proto); its few fields that matter are
read here, every length checked against what is left of the file. SentencePiece joins, again and
again, the neighbours whose joint piece has the highest score, the leftmost first among equals.
As a list of merges that is every split of every piece into two others, ordered by the piece's
score. Models for which this would not give SentencePiece's own ids are refused.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # "▁", which stands for a space inside pieces
WORDS = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"  # what text is cut into where no piece crosses a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of the format
BPE_MODEL = 2
LARGEST_FILE = 16 << 20  # bytes; the largest known, of 262,144 pieces, has under five million
MAX_PIECES = 1 << 20
LONGEST_PIECE = (
    512  # characters; SentencePiece's own default limit is 16, user-defined ones may be longer
)


@dataclass(kw_only=True)
class SentencePieceModel:
    """What a model file says. Ids are positions in `pieces`; -1 in the file (absent) is None
    here."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_suffix: bool = False
    unk_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None
    normalizer_name: str = ""
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    added_first: bool = False
    """Whether control and user-defined pieces are taken out of a text before anything else, so that
    a space is put before each part that is left. llama.cpp does that, SentencePiece does not. Then
    a piece of any type can be the result of a merge, too."""


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: an int, or the bytes of a string,
    message or fixed number."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                raise UserError(f"{where}: not a SentencePiece model, or cut off")
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire, -1) if wire != 2 else varint()
        if number == 0 or not 0 <= size <= len(data) - position:
            raise UserError(f"{where}: not a SentencePiece model, or cut off")
        yield number, data[position : position + size]
        position += size


def read_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`. `UserError` when it is not one, is cut off, or contradicts
    itself."""
    where = str(path)
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(f"{where}: {size} bytes, the limit is {LARGEST_FILE}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    model = SentencePieceModel()
    try:
        for number, value in _fields(data, where):
            if number == 1 and isinstance(value, bytes):
                if len(model.pieces) == MAX_PIECES:
                    raise UserError(f"{where}: more than {MAX_PIECES} pieces")
                _read_piece(model, value, where)
            elif number == 2 and isinstance(value, bytes):
                _read_trainer(model, value, where)
            elif number == 3 and isinstance(value, bytes):
                _read_normalizer(model, value, where)
    except (UnicodeDecodeError, struct.error, TypeError):
        raise UserError(f"{where}: not a SentencePiece model, or damaged") from None
    if not model.pieces:
        raise UserError(f"{where}: not a SentencePiece model (no pieces in it)")
    if len(set(model.pieces)) != len(model.pieces):
        raise UserError(f"{where}: a piece occurs twice")
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        token = getattr(model, name)
        if token is not None and token >= len(model.pieces):
            raise UserError(f"{where}: {name} {token} is outside its {len(model.pieces)} pieces")
    return model


def _read_piece(model: SentencePieceModel, data: bytes, where: str) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data, where):
        if number == 1 and isinstance(value, bytes):
            piece = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= len(piece) <= LONGEST_PIECE:
        raise UserError(
            f"{where}: piece {len(model.pieces)} has {len(piece)} characters, must be from 1 to "
            f"{LONGEST_PIECE}"
        )
    if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise UserError(
            f"{where}: piece {len(model.pieces)} has score {score} and type {kind}; the file is "
            "damaged"
        )
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer(model: SentencePieceModel, data: bytes, where: str) -> None:
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(data, where):
        if not isinstance(value, int):
            continue
        if number in ids:
            setattr(
                model, ids[number], None if value >= 1 << 31 else value
            )  # negative numbers come as huge ones
        elif number == 3:
            model.model_type = value
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number == 24:
            model.whitespace_suffix = bool(value)


def _read_normalizer(model: SentencePieceModel, data: bytes, where: str) -> None:
    flags = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
    for number, value in _fields(data, where):
        if number == 1 and isinstance(value, bytes):
            model.normalizer_name = value.decode()
        elif number == 2 and isinstance(value, bytes):
            model.charsmap = value
        elif number in flags and isinstance(value, int):
            setattr(model, flags[number], bool(value))


def check_supported(model: SentencePieceModel, where: str = "tokenizer.model") -> None:
    """`UserError` unless the fast tokenizer gives this model's ids exactly."""
    kinds = set(model.types)
    typed = list(zip(model.pieces, model.types, strict=True))
    for fault, what in (
        (model.model_type != BPE_MODEL, "not a BPE model"),
        (not model.byte_fallback, "no byte fallback"),
        (
            bool(model.charsmap),
            f"its own character normalization ({model.normalizer_name or 'unnamed'})",
        ),
        (model.remove_extra_whitespaces, "removes repeated spaces"),
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
        (bool(tied(model)), f"pieces of equal score ({', '.join(map(repr, tied(model)[:2]))})"),
    ):
        if fault:
            raise UserError(
                f"{where}: {what}, which cannot be converted exactly",
                hint=(
                    "use a BPE model with byte fallback and identity normalization, or a "
                    "tokenizer.json"
                ),
            )
    found = {piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == BYTE}
    if missing := sorted({f"<0x{byte:02X}>" for byte in range(256)} - found):
        raise UserError(f"{where}: {len(missing)} byte pieces are missing, {missing[0]} the first")


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
        normalizers,
        pre_tokenizers,
        processors,
    )

    check_supported(model, where)
    assert model.unk_id is not None
    bpe = models.BPE(
        vocab={piece: i for i, piece in enumerate(model.pieces)},
        merges=merges(model),
        unk_token=model.pieces[model.unk_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    check_runs(model, bpe, where)
    fast = Tokenizer(bpe)
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    if splits_at_spaces(model):
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
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
