"""llama2.c's `.bin` files, as its export.py writes them: what the reader is tried on."""

import struct

import torch

from mobilellm.model.network import Network
from mobilellm.model.weights import to_named

BLOCK_FIRST = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
BLOCK_SECOND = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")


def llama2c_bytes(network: Network, version: int = 0) -> bytes:
    """A plain network as a file of version 0 or 1."""
    config = network.config
    named = to_named(config, dict(network.named_parameters()))
    layers, half = range(config.num_hidden_layers), config.head_dim // 2

    def block(name: str) -> list[torch.Tensor]:
        found = [named[f"model.layers.{i}.{name}.weight"] for i in layers]
        if name.endswith(("q_proj", "k_proj")):  # pairs become neighbors
            shape = (-1, 2, half, config.hidden_size)
            found = [w.view(shape).transpose(1, 2).reshape(w.shape) for w in found]
        return found

    embedding, norm = named["model.embed_tokens.weight"], named["model.norm.weight"]
    attention_norms, ffn_norms = block("input_layernorm"), block("post_attention_layernorm")
    first = [w for name in BLOCK_FIRST for w in block(name)]
    second = [w for name in BLOCK_SECOND for w in block(name)]
    head = [] if config.tie_word_embeddings else [named["lm_head.weight"]]
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim))
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies).float()
    if version == 1:
        tensors = [*attention_norms, *ffn_norms, norm, embedding, *first, *second, *head]
    else:
        tensors = [embedding, *attention_norms, *first, *ffn_norms, *second, norm]
        tensors += [angles.cos(), angles.sin(), *head]
    vocab = config.vocab_size if version == 1 or config.tie_word_embeddings else -config.vocab_size
    header = struct.pack(
        "<7i",
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        vocab,
        config.max_position_embeddings,
    )
    if version == 1:
        tied = bytes([config.tie_word_embeddings])
        header = (b"24ka" + struct.pack("<i", 1) + header + tied).ljust(256, b"\0")
    return header + b"".join(t.contiguous().numpy().astype("<f4").tobytes() for t in tensors)
