"""llama2.c's `.bin` files and their tokenizers, in and out, to the byte.

Version 0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size negative when the
output layer is not tied), then float32 tensors, each kind over all layers: embedding, attention norms, wq, wk, wv, wo,
feed-forward norms, w1, w2, w3, final norm, cosines and sines for every position, and the output layer when not tied.
Version 1: magic "ak42", version, the same seven (vocab_size positive), one byte that says whether the output layer is
tied, padded to 256 bytes; then the norms first, and no cosines. Rotated pairs are neighbours there and half a head apart
here, so the rows of wq and wk change places. (github.com/karpathy/llama2.c, export.py and run.c.)

The tokenizer file: int32 longest piece, then for each piece a float32 score, an int32 length and its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.interop.checkpoint import LLAMA2C_MAGIC, Loaded
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network
from mobilellm.model.weights import load_weights, to_named
from mobilellm.tokenizer.sentencepiece import (
    BPE_MODEL,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    SentencePieceModel,
    to_fast_tokenizer,
)
from mobilellm.tokenizer.tokenizer import Tokenizer

HEADER_1 = 256  # bytes of a version 1 header
NORM_EPS = 1e-5  # fixed in llama2.c
THETA = 10000.0
Reader = Callable[..., Tensor]


def swap_pairs(weight: Tensor, heads: int, to_neighbours: bool) -> Tensor:
    """Reorder the rows of wq or wk (heads * D, C) between pairs half a head apart and neighbouring pairs."""
    rows, columns = weight.shape
    half = rows // heads // 2
    shape = (heads, 2, half, columns) if to_neighbours else (heads, half, 2, columns)
    return weight.view(shape).transpose(1, 2).reshape(rows, columns)


def _layout(config: ModelConfig, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of every block of numbers in the file, in order."""
    d, layers, ffn, vocab = (
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        config.vocab_size,
    )
    kv, half = config.num_key_value_heads * config.head_dim, config.head_dim // 2
    embedding = ("embed", (vocab, d))
    attention = [
        ("q", (layers, d, d)),
        ("k", (layers, kv, d)),
        ("v", (layers, kv, d)),
        ("o", (layers, d, d)),
    ]
    ffns = [("gate", (layers, ffn, d)), ("down", (layers, d, ffn)), ("up", (layers, ffn, d))]
    norms = [("attention_norm", (layers, d)), ("ffn_norm", (layers, d)), ("norm", (d,))]
    head: list[tuple[str, tuple[int, ...]]] = (
        [] if config.tie_word_embeddings else [("head", (vocab, d))]
    )
    if version == 1:
        return [*norms, embedding, *attention, *ffns, *head]
    angles = [(name, (config.max_position_embeddings, half)) for name in ("cos", "sin")]
    return [embedding, norms[0], *attention, norms[1], *ffns, norms[2], *angles, *head]


NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "down": "mlp.down_proj", "up": "mlp.up_proj",
}  # fmt: skip
OUTSIDE = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def read_header(path: Path) -> tuple[ModelConfig, int, int]:
    """(configuration, version, bytes of the header). `UserError` unless it is plausible and fits the file exactly."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_1)
    hint = "is it a float32 llama2.c model?"
    if len(head) < 28:
        raise UserError(f"{path}: {size} bytes are too few for a llama2.c file", hint=hint)
    version, tied, start = 0, True, 28
    if struct.unpack_from("<I", head)[0] == LLAMA2C_MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 1 or len(head) < HEADER_1:
            raise UserError(
                f"{path}: llama2.c version {version}, or cut off; versions 0 and 1 (float32) are read"
            )
        numbers, tied, start = struct.unpack_from("<7i", head, 8), bool(head[36]), HEADER_1
    else:
        numbers = struct.unpack_from("<7i", head)
        tied = numbers[5] > 0
    dim, hidden, layers, heads, kv_heads, vocab, length = numbers
    try:
        config = ModelConfig(
            vocab_size=abs(vocab), hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rope_theta=THETA,
            rms_norm_eps=NORM_EPS, tie_word_embeddings=tied, bos_token_id=1 if abs(vocab) > 2 else None,
            eos_token_id=2 if abs(vocab) > 2 else None,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: not a llama2.c header ({error.what})", hint=hint) from None
    wanted = start + 4 * sum(math.prod(shape) for _, shape in _layout(config, version))
    if wanted != size:
        raise UserError(f"{path}: {size} bytes where its header asks for {wanted}", hint=hint)
    return config, version, start


def load(path: Path, tokenizer: Path | None = None) -> Loaded:
    """Read a model, and the tokenizer beside it: `tokenizer`, or the only tok*.bin in its folder."""
    from mobilellm.interop.huggingface import check_weights

    config, version, start = read_header(path)
    named: dict[str, Tensor] = {}
    position = start
    data = np.memmap(path, dtype="u1", mode="r")
    for kind, shape in _layout(config, version):
        size = 4 * math.prod(shape)
        tensor = torch.from_numpy(
            np.frombuffer(data[position : position + size], dtype="<f4").reshape(shape).copy()
        )
        position += size
        if kind in ("cos", "sin"):
            continue  # computed anew from the positions
        if kind in OUTSIDE:
            named[OUTSIDE[kind]] = tensor
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(kind)
        for i, weight in enumerate(tensor):
            weight = swap_pairs(weight, heads, to_neighbours=False) if heads else weight
            named[f"model.layers.{i}.{NAMES[kind]}.weight"] = weight
    check_weights(named, str(path))
    network = Network(config, initialized=False)
    load_weights(network, named, str(path))
    beside = [p for p in path.parent.glob("tok*.bin") if p != path]
    file = tokenizer or (beside[0] if len(beside) == 1 else None)
    found = (
        None
        if file is None
        else read_tokenizer(file, config.vocab_size)
        if file.suffix == ".bin"
        else Tokenizer.load(file)
    )
    return Loaded(
        network=network, tokenizer=found, origin={"file": path.name, "llama2c_version": version}
    )


def save(path: Path, network: Network, version: int = 0) -> None:
    """Write a plain network. `UserError` for what the format cannot say."""
    config = network.config
    for fault, what in (
        (config.layer_repeats > 1, "shared layers"),
        (config.qk_norm, "qk_norm"),
        (config.rope_scaling is not None, "rope_scaling"),
        (config.rope_theta != THETA, f"rope_theta {config.rope_theta:g}"),
        (config.rms_norm_eps != NORM_EPS, f"rms_norm_eps {config.rms_norm_eps:g}"),
        (
            config.head_dim * config.num_attention_heads != config.hidden_size,
            "a head_dim of its own",
        ),
        (version not in (0, 1), f"version {version}"),
    ):
        if fault:
            raise UserError(f"llama2.c's format has no {what}", hint="convert --to hf or gguf")
    named = to_named(
        config, {name: p.detach().cpu().float() for name, p in network.named_parameters()}
    )
    vocab = config.vocab_size if version == 1 or config.tie_word_embeddings else -config.vocab_size
    numbers = struct.pack(
        "<7i", config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, vocab, config.max_position_embeddings,
    )  # fmt: skip
    with open(path, "wb") as file:
        if version == 1:
            header = (
                struct.pack("<Ii", LLAMA2C_MAGIC, 1) + numbers + bytes([config.tie_word_embeddings])
            )
            file.write(header.ljust(HEADER_1, b"\0"))
        else:
            file.write(numbers)
        for kind, _ in _layout(config, version):
            for tensor in _tensors(kind, config, named):
                file.write(tensor.contiguous().numpy().astype("<f4").tobytes())


def _tensors(kind: str, config: ModelConfig, named: dict[str, Tensor]) -> list[Tensor]:
    if kind in OUTSIDE:
        return [named[OUTSIDE[kind]]]
    if kind in ("cos", "sin"):
        # The formula and types of llama2.c's exporter, so that the bytes come out the same.
        frequencies = 1.0 / (
            THETA ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        )
        angles = torch.outer(
            torch.arange(config.max_position_embeddings).float(), frequencies
        ).float()
        return [angles.cos() if kind == "cos" else angles.sin()]
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(kind)
    found = [
        named[f"model.layers.{i}.{NAMES[kind]}.weight"] for i in range(config.num_hidden_layers)
    ]
    return [swap_pairs(weight, heads, to_neighbours=True) for weight in found] if heads else found


def read_pieces(path: Path, vocab_size: int) -> tuple[int, list[tuple[float, bytes]]]:
    """(longest piece, [(score, bytes)]) of a tokenizer file. `UserError` unless it holds exactly `vocab_size` pieces."""
    data = path.read_bytes() if path.stat().st_size <= 64 << 20 else b""
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
    """The tokenizer file as a fast tokenizer: a SentencePiece BPE with byte fallback, its spaces written as spaces."""
    _, pieces = read_pieces(path, vocab_size)
    if len(pieces) < 259:
        raise UserError(
            f"{path}: {len(pieces)} pieces are too few: 256 bytes and three special ones come first"
        )
    try:
        texts = [piece.decode() for _, piece in pieces]
    except UnicodeDecodeError:
        raise UserError(f"{path}: a piece is not UTF-8") from None
    model = SentencePieceModel(
        scores=[score for score, _ in pieces], types=[UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)],
        pieces=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(t.replace(" ", SPACE) for t in texts[259:])],
        model_type=BPE_MODEL, byte_fallback=True, remove_extra_whitespaces=False,
    )  # fmt: skip
    if len(set(model.pieces)) != len(model.pieces):
        raise UserError(f"{path}: a piece occurs twice")
    return Tokenizer(to_fast_tokenizer(model, str(path)), name=path.stem, bos_id=1, eos_id=2)


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """The tokenizer file of a tokenizer of the SentencePiece kind. `UserError` for a byte-level one, unknown to llama2.c."""
    from mobilellm.interop.tokenizer_parts import sentencepiece_parts

    model = sentencepiece_parts(tokenizer)
    written: list[tuple[float, bytes]] = []
    for i, (piece, score, kind) in enumerate(
        zip(model.pieces, model.scores, model.types, strict=True)
    ):
        text = (
            {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, piece) if kind == CONTROL else piece
        )  # as its exporter spells them
        written.append((score, text.replace(SPACE, " ").encode()))
    content = struct.pack("<i", max(len(text) for _, text in written))
    return content + b"".join(
        struct.pack("<fi", score, len(text)) + text for score, text in written
    )


def facts(path: Path) -> dict[str, Any]:
    """What the header says."""
    config, version, _ = read_header(path)
    return {
        "version": version,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
    }
