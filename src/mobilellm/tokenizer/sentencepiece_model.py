"""A SentencePiece model file, read.

    model = read_model(Path("tokenizer.model"))
    model.pieces, model.scores, model.types

The file is a protobuf message (sentencepiece_model.proto); its few fields that matter are read
here, every length checked against what is left of the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mobilellm.errors import UserError

SPACE = "\u2581"  # "▁", which stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of the format
UNIGRAM_MODEL, BPE_MODEL = 1, 2
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
    unk_surface: str = " \u2047 "
    """What an unknown piece decodes to."""
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
            if number == 44:
                model.unk_surface = value.decode()
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
