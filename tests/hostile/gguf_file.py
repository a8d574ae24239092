"""A GGUF writer without scruples: it writes whatever it is told.

build([key("general.architecture", "str", "llama")], [tensor("x", (4,), 0, 0)], bytes(16))
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

TYPES = {
    "u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8,
    "arr": 9, "u64": 10, "i64": 11, "f64": 12,
}  # fmt: skip
CODES = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
SHAPE = {"vocab": 300, "width": 32, "ffn": 64, "layers": 2, "heads": 2, "kv": 1, "context": 256}
MASK = 2**64 - 1


def text(value: str | bytes) -> bytes:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def content(kind: int, value: Any) -> bytes:
    if kind == TYPES["str"]:
        return text(value)
    if kind == TYPES["arr"]:
        inner, items = value
        number = TYPES[inner]
        head = struct.pack("<IQ", number, len(items))
        return head + b"".join(content(number, item) for item in items)
    return struct.pack(CODES[kind], value)


def key(name: str, kind: str, value: Any) -> bytes:
    return text(name) + struct.pack("<I", TYPES[kind]) + content(TYPES[kind], value)


def tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dimensions))
    sizes = b"".join(struct.pack("<Q", size & MASK) for size in dimensions)
    return head + sizes + struct.pack("<IQ", kind, offset & MASK)


def keys(**shape: int) -> dict[str, tuple[str, Any]]:
    """The keys of a llama of this shape."""
    s = SHAPE | shape
    return {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", "x"),
        "llama.embedding_length": ("u32", s["width"]),
        "llama.feed_forward_length": ("u32", s["ffn"]),
        "llama.block_count": ("u32", s["layers"]),
        "llama.attention.head_count": ("u32", s["heads"]),
        "llama.attention.head_count_kv": ("u32", s["kv"]),
        "llama.context_length": ("u32", s["context"]),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "llama.rope.freq_base": ("f32", 10000.0),
    }


def tokenizer_keys(pieces: list[str] | None = None, types: Any = None) -> dict[str, Any]:
    """The keys of a SentencePiece vocabulary of 300 pieces."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", *(f"p{i}" for i in range(14))]
    pieces = pieces or ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    return {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("arr", ("str", pieces)),
        "tokenizer.ggml.scores": ("arr", ("f32", [-float(i) for i in range(len(pieces))])),
        "tokenizer.ggml.token_type": ("arr", types or ("i32", [2, 3, 3] + [6] * 256 + [1] * 41)),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
    }


def shapes(head_width: int | None = None, **shape: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, rows first."""
    s = SHAPE | shape
    head = head_width or s["width"] // s["heads"]
    q, kv, width, ffn = s["heads"] * head, s["kv"] * head, s["width"], s["ffn"]
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (s["vocab"], width))]
    for i in range(s["layers"]):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "attn_q": (q, width), "attn_k": (kv, width),
            "attn_v": (kv, width), "attn_output": (width, q), "ffn_norm": (width,),
            "ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn),
        }  # fmt: skip
        found += [(f"blk.{i}.{name}.weight", size) for name, size in block.items()]
    return [*found, ("output_norm.weight", (width,))]


def build(
    entries: list[bytes], tensors: list[bytes], data: bytes, *, version: int = 3,
    tensor_count: int | None = None, key_count: int | None = None,
) -> bytes:  # fmt: skip
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if key_count is None else key_count,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *(count & MASK for count in counts))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def whole(
    values: dict[str, tuple[str, Any]] | None = None,
    tensors: list[tuple[str, tuple[int, ...]]] | None = None,
) -> bytes:
    """A sound file, with other keys or tensors where they are given."""
    rng, data, listed = np.random.default_rng(0), b"", []
    for name, size in tensors or shapes():
        listed.append(tensor(name, size[::-1], 0, len(data)))
        data += (rng.standard_normal(size) * 0.05).astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    values = values or keys() | tokenizer_keys()
    return build([key(name, *value) for name, value in values.items()], listed, data)
