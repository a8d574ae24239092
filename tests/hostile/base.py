"""Sound inputs of every format, made once: what the cases change.

base = make_base(Path("/tmp/base"))
base / "hf", base / "m.gguf", base / "data", base / "run"
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file
from tests.command_line import status_of
from tests.hostile import gguf_file
from tests.interop.networks import checkpoint, network
from tests.rows import write_rows

from mobilellm.tokenizer.chat_template import CHATML
from mobilellm.tokenizer.sentencepiece import SentencePieceModel
from mobilellm.tokenizer.sentencepiece_file import write_model
from mobilellm.tokenizer.tokenizer import train_bpe

TEXT = "The quick brown fox jumps over the lazy dog, 12 times.\n"
TRAIN = (
    "--model.preset", "1M", "--train.steps", "2", "--train.batch-tokens", "64",
    "--data.sequence-length", "32", "--train.compile", "off", "--train.precision", "fp32",
    "--model.override", "num_hidden_layers=1",
)  # fmt: skip


def call(*arguments: object) -> None:
    """A verb that has to succeed."""
    assert status_of(*arguments) == 0, arguments


def make_base(folder: Path) -> Path:
    """The folder with a sound input of every format."""
    folder.mkdir(parents=True)
    model = network(
        vocab_size=300, num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8
    )
    tokenizer = train_bpe([TEXT * 50], 300).replaced(chat_template=CHATML)
    source = checkpoint(folder / "hf", model, tokenizer)
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "m.gguf").write_bytes(gguf_file.whole())
    (folder / "text.txt").write_text(TEXT * 80)
    rows = [{"text": f"{TEXT} {i}", "n": i} for i in range(40)]
    write_rows(folder / "rows.jsonl", rows)
    prepared = ("--tokenizer", source, "--workers", 1)
    call("prepare", folder / "text.txt", folder / "rows.jsonl", "--out", folder / "data", *prepared)
    call("train", "--data.path", folder / "data", "--out", folder / "run", *TRAIN)
    call("quantize", source, folder / "quantized", "--scheme", "int8", "--method", "round")
    layout = folder / "layout" / "1"
    layout.mkdir(parents=True)
    shutil.copytree(source, folder / "layout" / "tokenizer")
    samples = [{"token_ids": [i % 300] * 17, "source": "ab"[i % 2]} for i in range(20)]
    (layout / "a.jsonl").write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in samples))
    call("data-stats", folder / "layout")  # which makes its index
    (folder / "sp").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder / "sp" / name)
    write_model(pieces(), folder / "sp" / "tokenizer.model")
    result = {
        "name": "x", "baselines": {"gzip": 2.0}, "next": [],
        "held_out": {"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.2, "bytes": 9, "tokens": 3},
        "samples": [{"prompt": "a", "text": "b", "seed": 1, "temperature": 0.8, "top_k": 0}],
        "training": {"steps": 2, "tokens": 9, "seconds": 1.0, "tokens_per_second": 9.0},
        "model": {"parameters": {"total": 5}, "layers": 1},
        "data": {"sources": [{"name": "s", "tokens": 5}]},
    }  # fmt: skip
    (folder / "run" / "result.json").write_bytes(orjson.dumps(result))
    (folder / "profile.json").write_bytes(orjson.dumps(PROFILE))
    return folder


def pieces() -> SentencePieceModel:
    """A SentencePiece BPE of 300 pieces."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", *(f"p{i}" for i in range(14))]
    return SentencePieceModel(
        pieces=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words],
        scores=[-float(i) for i in range(300)],
        types=[2, 3, 3, *[6] * 256, *[1] * 41],
        model_type=2,
        byte_fallback=True,
        remove_extra_whitespaces=False,
    )


FIGURE = {"median": 2.0, "lowest": 1.0, "highest": 3.0, "values": [1.0, 2.0, 3.0]}
PROFILE: dict[str, Any] = {
    "format": "mobilellm device profile", "format_version": 1, "made_by": "x", "date": "today",
    "machine": {"device": "d"}, "settings": {"prompt": 8}, "bandwidth": {"read": FIGURE},
    "interrupted": False,
    "rows": [
        {"name": "n", "file": "f", "runtime": "r", "runtime_version": "1", "bytes": 5,
         "sha256": "0", "model": None, "figures": {"load_ms": FIGURE}, "bytes_per_token": 3,
         "bandwidth_share": 0.5, "operators": None, "error": None},
    ],
}  # fmt: skip
