"""llama2.c's `.bin` files and their tokenizers, in.

    network, origin = read(Path("stories260K.bin"))
    tokenizer = read_tokenizer(Path("tok512.bin"), vocab_size=512)

Version 0 holds seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len;
vocab_size is negative when the output layer is not tied), then float32 tensors, each kind over all
layers: embedding, attention norms, wq, wk, wv, wo, feed-forward norms, w1, w2, w3, final norm,
cosines and sines for every position, and the output layer when it is not tied.

Version 1 holds the magic "ak42", the version, the same seven numbers (vocab_size positive) and one
byte that says whether the output layer is tied, padded to 256 bytes; then the norms first, and no
cosines. (github.com/karpathy/llama2.c, export.py and run.c.)

A tokenizer file holds the length of the longest piece as int32, then for each piece its score as
float32, its length as int32, and its bytes.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.families.names import LLAMA2C_BLOCK, LLAMA2C_OUTSIDE, reordered
from mobilellm.interop.loaded import Loaded, Reader
from mobilellm.model.config import ModelConfig
from mobilellm.tokenizer.sentencepiece import to_fast_tokenizer
from mobilellm.tokenizer.sentencepiece_model import (
    BPE_MODEL,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    SentencePieceModel,
)
from mobilellm.tokenizer.tokenizer import Tokenizer
from mobilellm.weights.assemble import assemble, check_weights

MAGIC = 0x616B3432  # "ak42", of version 1 and later
HEADER_1 = 256  # bytes of a version 1 header
NORM_EPS = 1e-5  # fixed in llama2.c
THETA = 10000.0
MAX_TOKENIZER = 64 << 20  # bytes of a tokenizer file


def layout(config: ModelConfig, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every block of numbers in the file, in order, by llama2.c's names."""
    width, layers = config.hidden_size, config.num_hidden_layers
    ffn, vocab = config.intermediate_size, config.vocab_size
    kv, half = config.num_key_value_heads * config.head_dim, config.head_dim // 2
    embedding = ("token_embedding_table", (vocab, width))
    matrices: list[tuple[str, tuple[int, ...]]] = [
        ("wq", (layers, width, width)),
        ("wk", (layers, kv, width)),
        ("wv", (layers, kv, width)),
        ("wo", (layers, width, width)),
        ("w1", (layers, ffn, width)),
        ("w2", (layers, width, ffn)),
        ("w3", (layers, ffn, width)),
    ]
    attention_norms = ("rms_att_weight", (layers, width))
    ffn_norms = ("rms_ffn_weight", (layers, width))
    final_norm = ("rms_final_weight", (width,))
    head = [] if config.tie_word_embeddings else [("wcls", (vocab, width))]
    if version == 1:
        return [attention_norms, ffn_norms, final_norm, embedding, *matrices, *head]
    angles = [(name, (config.max_position_embeddings, half)) for name in ("cos", "sin")]
    first, second = matrices[:4], matrices[4:]
    return [embedding, attention_norms, *first, ffn_norms, *second, final_norm, *angles, *head]


def read_header(path: Path) -> tuple[ModelConfig, int, int]:
    """Configuration, version, and bytes of the header.

    `UserError` unless the header is plausible and the file has the size that it asks for.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_1)
    hint = "is it a float32 llama2.c model?"
    if len(head) < 28:
        raise UserError(f"{path}: {size} bytes are too few for a llama2.c file", hint=hint)
    version, tied, start = 0, True, 28
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 1 or len(head) < HEADER_1:
            raise UserError(
                f"{path}: llama2.c version {version}, or cut off; "
                "versions 0 and 1 (float32) are read"
            )
        numbers, tied, start = struct.unpack_from("<7i", head, 8), bool(head[36]), HEADER_1
    else:
        numbers = struct.unpack_from("<7i", head)
        tied = numbers[5] > 0
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers
    try:
        config = ModelConfig(
            vocab_size=abs(vocab),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rope_theta=THETA,
            rms_norm_eps=NORM_EPS,
            tie_word_embeddings=tied,
            bos_token_id=1 if abs(vocab) > 2 else None,
            eos_token_id=2 if abs(vocab) > 2 else None,
        )
    except UserError as error:
        raise UserError(f"{path}: not a llama2.c header ({error.what})", hint=hint) from None
    wanted = start + 4 * sum(math.prod(shape) for _, shape in layout(config, version))
    if wanted != size:
        raise UserError(f"{path}: {size} bytes where its header asks for {wanted}", hint=hint)
    return config, version, start


def read(path: Path, *_: object) -> Loaded:
    """The model. `UserError` for a header that does not fit the file.

    A reader's other arguments are not looked at: the format has no shared layers and no keys.
    """
    config, version, position = read_header(path)
    named: dict[str, Tensor] = {}
    data = np.memmap(path, dtype="u1", mode="r")
    for name, shape in layout(config, version):
        size = 4 * math.prod(shape)
        numbers = np.frombuffer(data[position : position + size], dtype="<f4")
        position += size
        if name in ("cos", "sin"):
            continue  # computed anew from the positions
        tensor = torch.from_numpy(numbers.reshape(shape).copy())
        if name in LLAMA2C_OUTSIDE:
            named[f"{LLAMA2C_OUTSIDE[name]}.weight"] = tensor
            continue
        for i, weight in enumerate(tensor):
            ours = f"model.layers.{i}.{LLAMA2C_BLOCK[name]}.weight"
            named[ours] = reordered(config, ours, weight, to="halves")
    check_weights(named, str(path))
    network = assemble(config, named, str(path))
    return Loaded(network=network, tokenizer=None, origin=_origin(path, version))


def describe(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and origin, from the header alone."""
    config, version, _ = read_header(path)
    return config, _origin(path, version)


def _origin(path: Path, version: int) -> dict[str, Any]:
    return {"file": path.name, "llama2c_version": version}


def read_pieces(path: Path, vocab_size: int) -> tuple[int, list[tuple[float, bytes]]]:
    """Length of the longest piece in bytes, and each piece with its score: (score, bytes).

    `UserError` unless the file holds exactly `vocab_size` pieces.
    """
    data = path.read_bytes() if path.stat().st_size <= MAX_TOKENIZER else b""
    broken = UserError(
        f"{path}: not a llama2.c tokenizer of {vocab_size} pieces",
        hint="give the one that belongs to the model",
    )
    if len(data) < 4:
        raise broken
    longest, position = struct.unpack_from("<i", data)[0], 4
    pieces: list[tuple[float, bytes]] = []
    while position < len(data):
        if position + 8 > len(data):
            raise broken
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        if not 0 <= length <= len(data) - position or math.isnan(score):
            raise broken
        pieces.append((score, data[position : position + length]))
        position += length
    if len(pieces) != vocab_size:
        raise broken
    return longest, pieces


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a file: a SentencePiece BPE with byte fallback, its spaces plain spaces."""
    _, pieces = read_pieces(path, vocab_size)
    if len(pieces) < 259:
        raise UserError(
            f"{path}: {len(pieces)} pieces are too few: 256 bytes and three special ones come first"
        )
    try:
        texts = [piece.decode() for _, piece in pieces]
    except UnicodeDecodeError:
        raise UserError(f"{path}: a piece is not UTF-8") from None
    words = [text.replace(" ", SPACE) for text in texts[259:]]
    model = SentencePieceModel(
        pieces=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words],
        scores=[score for score, _ in pieces],
        types=[UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)],
        model_type=BPE_MODEL,
        byte_fallback=True,
        remove_extra_whitespaces=False,
    )
    if len(set(model.pieces)) != len(model.pieces):
        raise UserError(f"{path}: a piece occurs twice")
    return Tokenizer(to_fast_tokenizer(model, str(path)), name=path.stem, bos_id=1, eos_id=2)


def tokenizer_beside(path: Path) -> Tokenizer | None:
    """The tokenizer of a model: the only tok*.bin in its folder, or None."""
    beside = [file for file in path.parent.glob("tok*.bin") if file != path]
    if len(beside) != 1:
        return None
    return read_tokenizer(beside[0], read_header(path)[0].vocab_size)


READER = Reader(
    name="llama2c",
    what="a llama2.c .bin",
    recognizes=lambda path: path.suffix == ".bin",
    read=read,
    read_tokenizer=tokenizer_beside,
    describe=describe,
)
