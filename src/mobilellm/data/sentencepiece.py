"""A fast tokenizer, with the same ids, from a SentencePiece BPE model with byte fallback (the Llama and Mistral kind).

    model = read_model(Path("tokenizer.model"))
    fast = to_fast_tokenizer(model)          # a tokenizers.Tokenizer

The model file is a protobuf message (sentencepiece_model.proto); its few fields that matter are read here, every length
checked against what is left of the file. SentencePiece joins, again and again, the neighbours whose joint piece has the
highest score. As a list of merges that is every split of every piece into two others, ordered by the piece's score.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # "▁", which stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of the format
BPE_MODEL = 2
LARGEST_FILE = 64 << 20


@dataclass(kw_only=True)
class SentencePieceModel:
    """What a model file says. Ids are positions in `pieces`; -1 in the file (absent) is None here."""

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
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: an int, or the bytes of a string, message or fixed number."""
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
    """Read a `tokenizer.model`. `UserError` when it is not one, is cut off, or contradicts itself."""
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
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _read_trainer(model: SentencePieceModel, data: bytes, where: str) -> None:
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(data, where):
        if not isinstance(value, int):
            continue
        if number in ids:
            setattr(model, ids[number], None if value >= 1 << 31 else value)  # negative numbers come as huge ones
        elif number == 3:
            model.model_type = value
        elif number == 35:
            model.byte_fallback = bool(value)
        elif number == 24:
            model.whitespace_suffix = bool(value)


def _read_normalizer(model: SentencePieceModel, data: bytes, where: str) -> None:
    flags = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
    for number, value in _fields(data, where):
        if number == 2 and isinstance(value, bytes):
            model.charsmap = value
        elif number in flags and isinstance(value, int):
            setattr(model, flags[number], bool(value))


def check_supported(model: SentencePieceModel, where: str = "tokenizer.model") -> None:
    """`UserError` unless the fast tokenizer gives this model's ids exactly."""
    kinds = set(model.types)
    for fault, what in (
        (model.model_type != BPE_MODEL, "not a BPE model"),
        (not model.byte_fallback, "no byte fallback"),
        (bool(model.charsmap), "its own character normalisation"),
        (model.remove_extra_whitespaces, "removes repeated spaces"),
        (not model.escape_whitespaces, "does not escape spaces"),
        (model.whitespace_suffix, "spaces behind words"),
        (USER_DEFINED in kinds, "user-defined pieces"),
        (UNUSED in kinds, "unused pieces"),
        (model.unk_id is None, "no unknown piece"),
    ):
        if fault:
            raise UserError(
                f"{where}: {what}, which cannot be converted exactly",
                mend="use a BPE model with byte fallback and identity normalisation, or a tokenizer.json",
            )
    found = {piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == BYTE}
    if missing := sorted({f"<0x{byte:02X}>" for byte in range(256)} - found):
        raise UserError(f"{where}: {len(missing)} byte pieces are missing, {missing[0]} the first")


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best first."""
    score = {p: s for p, s, kind in zip(model.pieces, model.scores, model.types, strict=True) if kind == NORMAL}
    ordered = sorted(score, key=lambda piece: -score[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ordered
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def splits_at_spaces(model: SentencePieceModel) -> bool:
    """Whether no piece has a space behind another character.

    Then nothing is ever joined across such a place, and text can be cut there before tokenising with no change to the
    ids: words are looked up in a cache, and a long document is no longer one word.
    """
    return not any(SPACE in piece.lstrip(SPACE) for piece, kind in zip(model.pieces, model.types, strict=True) if kind == NORMAL)


def to_fast_tokenizer(model: SentencePieceModel, where: str = "tokenizer.model") -> tokenizers.Tokenizer:
    """The same tokenizer for the `tokenizers` library. `UserError` for models it could not equal."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    check_supported(model, where)
    assert model.unk_id is not None
    fast = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(model.pieces)}, merges=merges(model),
            unk_token=model.pieces[model.unk_id], fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    if splits_at_spaces(model):
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [p for p, kind in zip(model.pieces, model.types, strict=True) if kind in (CONTROL, UNKNOWN)]
    if model.bos_id is not None:  # as the Llama family does: one BOS before a text that is tokenised by itself
        bos = model.pieces[model.bos_id]
        fast.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, model.bos_id)]
        )
    fast.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    return fast
