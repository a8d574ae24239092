"""A `tokenizer.model` file, for runners that read a SentencePiece vocabulary from nothing else.

    write_model(parts, Path("tokenizer.model"))     # a SentencePieceModel, read by read_model

The file is a protobuf message; fields have the numbers of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from pathlib import Path

from mobilellm.files import write_file
from mobilellm.tokenizer.sentencepiece_model import SentencePieceModel

VARINT, LENGTH, FIXED32 = 0, 2, 5  # protobuf's ways to store a value
ABSENT = (1 << 64) - 1  # -1, which protobuf stores as a number of 64 bits


def write_model(model: SentencePieceModel, path: Path) -> None:
    """Write the model; `read_model` gives an equal one."""
    pieces = zip(model.pieces, model.scores, model.types, strict=True)
    message = b"".join(_text(1, _piece(*piece)) for piece in pieces)
    ids = (model.unk_id, model.bos_id, model.eos_id, model.pad_id)
    trainer = _number(3, model.model_type) + _number(4, len(model.pieces))
    trainer += _number(24, model.whitespace_suffix) + _number(35, model.byte_fallback)
    for field, token in enumerate(ids, 40):
        trainer += _number(field, ABSENT if token is None else token)
    normalizer = _text(1, (model.normalizer_name or "identity").encode())
    normalizer += _text(2, model.charsmap) if model.charsmap else b""
    flags = (model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces)
    for field, flag in enumerate(flags, 3):
        normalizer += _number(field, flag)
    write_file(path, message + _text(2, trainer) + _text(3, normalizer))


def _piece(piece: str, score: float, kind: int) -> bytes:
    stored = _varint(2 << 3 | FIXED32) + struct.pack("<f", score)
    return _text(1, piece.encode()) + stored + _number(3, kind)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(int(value))


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | LENGTH) + _varint(len(value)) + value
