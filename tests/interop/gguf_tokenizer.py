"""GGUF files with a tokenizer and next to no weights, for tests that ask llama.cpp for ids."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

TYPES = {"model": "add_tokenizer_model", "pre": "add_tokenizer_pre"}


def tokenizer_file(path: Path, pieces: list[str], types: list[int], **keys: Any) -> Path:
    """A llama of one layer with these pieces; `keys` are those under tokenizer.ggml."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    for key, value in keys.items():
        if key == "merges":
            writer.add_token_merges(value)
        elif key == "scores":
            writer.add_token_scores(value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_string(f"tokenizer.ggml.{key}", value)
    block = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32)}
    block |= {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"token_embd.weight": (len(pieces), 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
