"""The network's weights under the names of the Hugging Face Llama family, and back.

In memory Q, K and V are one matrix and gate and up another; on disk each has its own name, so that
checkpoints load elsewhere. Both directions are exact. A layer-sharing network has one copy of each
block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobilellm.errors import UserError
from mobilellm.model.config import ModelConfig
from mobilellm.model.network import Network

# Tensors on disk that have a row for each token of the vocabulary.
VOCABULARY_ROWS = ("model.embed_tokens.weight", "lm_head.weight")
# In-memory name -> the names on disk that it is stacked from, and how many rows each has.
COPIED_AT_ONCE = 1 << 21
"""Numbers of a tensor that lie in memory twice while a network is loaded."""
Stacks = dict[str, list[tuple[str, int]]]


def stacks(config: ModelConfig) -> Stacks:
    """Every in-memory parameter, with its parts on disk in order, as (name, rows)."""
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    ffn, width, vocab = config.intermediate_size, config.hidden_size, config.vocab_size
    found: Stacks = {"embed_tokens.weight": [("model.embed_tokens.weight", vocab)]}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        found[ours + "input_layernorm.weight"] = [(theirs + "input_layernorm.weight", width)]
        found[ours + "self_attn.qkv_proj.weight"] = [
            (theirs + f"self_attn.{name}_proj.weight", rows)
            for name, rows in (("q", q), ("k", kv), ("v", kv))
        ]
        if config.qk_norm and config.qk_norm_gain:
            for name in ("q_norm", "k_norm"):
                found[ours + f"self_attn.{name}.weight"] = [
                    (theirs + f"self_attn.{name}.weight", config.head_dim)
                ]
        found[ours + "self_attn.o_proj.weight"] = [(theirs + "self_attn.o_proj.weight", width)]
        found[ours + "post_attention_layernorm.weight"] = [
            (theirs + "post_attention_layernorm.weight", width)
        ]
        found[ours + "mlp.gate_up_proj.weight"] = [
            (theirs + f"mlp.{name}_proj.weight", ffn)
            for name in (("gate", "up") if config.feed_forward == "swiglu" else ("up",))
        ]
        found[ours + "mlp.down_proj.weight"] = [(theirs + "mlp.down_proj.weight", width)]
    found["norm.weight"] = [("model.norm.weight", width)]
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = [("lm_head.weight", vocab)]
    return found


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape of every tensor a checkpoint of this configuration holds."""
    q, ffn, width = (
        config.num_attention_heads * config.head_dim,
        config.intermediate_size,
        config.hidden_size,
    )
    columns = {"self_attn.o_proj.weight": q, "mlp.down_proj.weight": ffn}
    return {
        name: (rows,)
        if name.endswith("norm.weight")
        else (rows, columns.get(".".join(name.split(".")[3:]), width))
        for parts in stacks(config).values()
        for name, rows in parts
    }


def to_named(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In-memory tensors (parameters, or anything laid out like them) -> the names on disk, as
    contiguous tensors."""
    named: dict[str, Tensor] = {}
    for ours, parts in stacks(config).items():
        pieces = state[ours].detach().split([rows for _, rows in parts])
        named.update(
            (name, piece.contiguous()) for (name, _), piece in zip(parts, pieces, strict=True)
        )
    # A norm without a gain is one with a gain of 1 to every other tool.
    return named | {name: torch.ones(config.head_dim) for name in _absent_gains(config)}


def _absent_gains(config: ModelConfig) -> list[str]:
    """Names on disk of the gains that the network's QK-norms have none of."""
    if not config.qk_norm or config.qk_norm_gain:
        return []
    names, layers = ("q_norm", "k_norm"), range(config.num_hidden_layers)
    return [f"model.layers.{i}.self_attn.{name}.weight" for i in layers for name in names]


def check_named(config: ModelConfig, named: Mapping[str, Tensor], where: str = "weights") -> None:
    """`UserError` names every missing, unexpected and misshapen tensor."""
    expected = shapes(config)
    complaints = []
    if absent := _absent_gains(config):
        gains = [named[name] for name in absent if name in named]
        if any(gain.device.type != "meta" and not bool((gain == 1).all()) for gain in gains):
            raise UserError(
                f"{where}: gains of the QK-norms differ from 1, and qk_norm_gain is false",
                hint="the weights and config.json belong to different models",
            )
        named = {name: tensor for name, tensor in named.items() if name not in set(absent)}
    if missing := sorted(expected.keys() - named.keys()):
        complaints.append(f"missing {listed(missing)}")
    if unexpected := sorted(named.keys() - expected.keys()):
        complaints.append(f"unexpected {listed(unexpected)}")
    wrong = [
        f"{name} {tuple(named[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in named and tuple(named[name].shape) != shape
    ]
    if wrong:
        complaints.append(f"wrong shape: {listed(wrong)}")
    if complaints:
        raise UserError(
            f"{where}: {'; '.join(complaints)}",
            hint="the weights and config.json belong to different models",
        )


def from_named(
    config: ModelConfig, named: Mapping[str, Tensor], where: str = "weights"
) -> dict[str, Tensor]:
    """The names on disk -> in-memory tensors. `UserError` as `check_named` says."""
    check_named(config, named, where)
    return {
        ours: torch.cat([named[name] for name, _ in parts])
        if len(parts) > 1
        else named[parts[0][0]]
        for ours, parts in stacks(config).items()
    }


def listed(names: list[str], most: int = 40) -> str:
    """Names with commas between; of more than `most` the rest is counted."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_weights(
    network: Network,
    named: Mapping[str, Tensor],
    where: str = "weights",
    copied: Callable[[], object] = lambda: None,
) -> None:
    """Copy tensors under their names on disk into `network`, a part after the other; `copied` is
    called behind each part."""
    check_named(network.config, named, where)
    parts = stacks(network.config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            pieces = parameter.split([rows for _, rows in parts[name]])
            for (theirs, _), piece in zip(parts[name], pieces, strict=True):
                rows = max(1, COPIED_AT_ONCE // max(1, piece[:1].numel()))
                for start in range(0, len(piece), rows):
                    piece[start : start + rows].copy_(named[theirs][start : start + rows])
                    copied()


def grow_vocabulary(
    config: ModelConfig, named: Mapping[str, Tensor], vocab_size: int
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights (under their names on disk) with a vocabulary of `vocab_size`.

    New rows of the embedding, and of an output layer that is not tied, are the mean of the old
    rows: the logit of a new token is then the mean of the old logits, so that it takes little
    probability from the old tokens (John Hewitt, "Initializing New Word Embeddings for Pretrained
    Language Models", 2021). The old rows keep their bits.

    config, named = grow_vocabulary(loaded.config, named, tokenizer.vocab_size)

    `UserError` when `vocab_size` is smaller than the vocabulary that the weights have.
    """
    if vocab_size < config.vocab_size:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is smaller than the model's {config.vocab_size}",
            hint="it may only grow: use the model's own tokenizer, or one that extends it",
        )
    new = vocab_size - config.vocab_size
    grown = dict(named)
    for name in VOCABULARY_ROWS:
        if new and name in grown:
            rows = grown[name]  # (V, C)
            mean = rows.mean(dim=0, keepdim=True, dtype=torch.float64).to(rows.dtype)
            grown[name] = torch.cat([rows, mean.expand(new, -1)])
    return dataclasses.replace(config, vocab_size=vocab_size), grown


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the permissions that umask gives.

    The safetensors library makes its files readable by their owner alone, whatever umask says. So
    an ordinary file is made first, and its permissions are given to the library's.
    """
    path.touch()
    permissions = path.stat().st_mode
    save_file(
        {name: tensor.cpu() for name, tensor in named.items()}, path, metadata={"format": "pt"}
    )
    path.chmod(permissions)
